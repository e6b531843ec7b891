def spawn(
    candidates: tuple[bytes, ...],
    argv: tuple[bytes, ...],
    envp: tuple[bytes, ...],
    steps: tuple[tuple[int, int, int, int, bytes], ...],
    fds: tuple[int, int, int],
    cgroup_fd: int,
    slot: bytearray,
    exec_fd: int = -1,
    /,
) -> tuple[int, int, int, int, int, int]: ...
def set_child_subreaper() -> None: ...
