"""A process tree in which pidfd_getfd fails with EPERM, as under Docker's default seccomp profile.

``python -m no_pidfd_getfd …`` is a server in it.
"""

import ctypes
import errno
import os
import runpy
import struct
from pathlib import Path

_PIDFD_GETFD = 438
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 22, 38
_MODE_FILTER = 2
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000


def forbid(number: int = errno.EPERM) -> None:
    """Install a seccomp filter for this process and all that it starts. Nothing takes it away again."""
    program = [
        (_LOAD, 0, 0, 0),  # the system call's number
        (_JUMP_IF_EQUAL, 0, 1, _PIDFD_GETFD),
        (_RETURN, 0, 0, _ERRNO | number),
        (_RETURN, 0, 0, _ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    filter_program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (_PR_SET_SECCOMP, _MODE_FILTER, filter_program, 0, 0)):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), f"prctl: {os.strerror(ctypes.get_errno())}")


def is_filtered(pid: int) -> bool:
    """Whether a seccomp filter is in force in a process."""
    return "\nSeccomp:\t2\n" in Path(f"/proc/{pid}/status").read_text()


if __name__ == "__main__":
    forbid()
    runpy.run_module("anchortp_sglang.launch_server", run_name="__main__", alter_sys=True)
