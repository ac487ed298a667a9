"""A zygote in an interpreter of its own: ``python -m anchortp_sglang.zygote_main CONTROL_FD EXITS_FD``."""

import gc
import socket
import sys


def main(control_fd: int, exits_fd: int) -> None:
    """Import SGLang, install the hooks, serve. The environment is inherited from main.

    It ends when main's end of the socket closes. A parent-death signal would come when the thread of main that
    started it ends (prctl(2)), which may be long before.
    """
    from anchortp_sglang.recovery.processes.exits import Exits
    from anchortp_sglang.recovery.processes.zygote import announce, serve
    from anchortp_sglang.startup import device
    from anchortp_sglang.startup.fork_guard import unfit_to_fork

    device.install_stand_ins()
    from anchortp_sglang.hooks import (
        preload,  # these import SGLang, which needs the stand-ins
        table,  # these import SGLang, which needs the stand-ins
    )
    from anchortp_sglang.rank import messages

    preload.import_sglang()
    from sglang.srt.plugins import load_plugins

    table.install_all(allow_drift=True)  # main has compared it already
    load_plugins()
    messages.register()
    reason = unfit_to_fork()
    if reason is not None:
        sys.exit(f"anchortp: the zygote cannot fork: {reason}")
    gc.collect()
    gc.freeze()
    control = socket.socket(fileno=control_fd)
    announce(control)
    serve(control, Exits(exits_fd))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
