"""PR_SET_CHILD_SUBREAPER(2const): orphaned descendants become children of ours, not of init's."""

from __future__ import annotations

import importlib
import os
from typing import Any, Final

_PR_SET_CHILD_SUBREAPER: Final = 36


def set_child_subreaper() -> None:
    """Raises OSError. Of the Python standard library only ctypes can do it, which costs half a megabyte."""
    try:
        native: Any = importlib.import_module("worker_svc.supervisor.spawn._native")
        native.set_child_subreaper()
        return
    except (ImportError, AttributeError):
        pass
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1), 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
