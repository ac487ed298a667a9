"""What the kernel says about a process."""

import select


def is_dead(pidfd: int) -> bool:
    return died_within(pidfd, 0.0)


def died_within(pidfd: int, timeout_s: float) -> bool:
    """Wait for a process's death: its pidfd becomes readable once its memory is torn down."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(timeout_s * 1000))


def process_state(pid: int) -> str | None:
    """State letter of /proc/<pid>/stat ("T": stopped); None when there is no such process."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return None
