"""The harness is the init of its processes: whoever loses its parent falls to it (PR_SET_CHILD_SUBREAPER(2const))."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from typing import Final

_PR_SET_CHILD_SUBREAPER: Final = 36


class Reaper:
    """Reaps in a thread, at once as systemd does, or some time later as other inits do."""

    def __init__(self) -> None:
        if ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
            raise OSError("this kernel has no subreaper")
        self.delay_s = 0.0
        self.spared: set[int] = set()
        threading.Thread(target=self._work, name="reaper", daemon=True).start()

    def spare(self, pid: int) -> None:
        """A child whose status somebody else takes: once, since its number can then be another's."""
        self.spared.add(pid)

    def _work(self) -> None:
        while True:
            try:
                dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
                assert dead is not None
                if dead.si_pid not in self.spared:
                    time.sleep(self.delay_s)
                    os.waitid(os.P_PID, dead.si_pid, os.WEXITED | os.WNOHANG)
                elif not self._wait_taken(dead.si_pid):
                    self.spared.discard(dead.si_pid)
            except ChildProcessError:
                time.sleep(0.01)

    def _wait_taken(self, pid: int) -> bool:
        """The kernel names the dead in an order of its own: until this one is gone it may hide others."""
        while True:
            try:
                if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                    return False  # another process by now
            except ChildProcessError:
                return False
            time.sleep(0.005)
