"""A zygote in a new interpreter: ``python -m anchortp_sglang.zygote_main CONTROL_FD EXITS_FD``."""

import gc
import socket
import sys


def main(control_fd: int, exits_fd: int) -> None:
    """Import SGLang, install the hooks, and serve until main's end of the socket closes.

    The environment is inherited from main. A parent-death signal would come too early, when the thread of main that
    started the zygote ends (prctl(2)).
    """
    from anchortp_sglang.recovery.processes.exits import Exits
    from anchortp_sglang.recovery.processes.zygote_loop import announce, serve
    from anchortp_sglang.startup import device
    from anchortp_sglang.startup.fork_guard import unfit_to_fork

    device.install_stand_ins()
    from anchortp_sglang.hooks import install, preload, table  # after the stand-ins, which SGLang needs
    from anchortp_sglang.rank import messages, warmup

    preload.import_sglang()
    table.install_all(allow_drift=True)  # main has compared the manifest
    install.register_models()
    install.load_plugins()
    messages.register()
    warmup.read_ahead()
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
