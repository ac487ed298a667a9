"""A zygote in an interpreter of its own: ``python -m anchortp_sglang.zygote_main FD PARENT_PID``."""

import gc
import socket
import sys


def main(control_fd: int, parent: int) -> None:
    """Import SGLang, install the hooks, serve. The environment is inherited from main."""
    from anchortp_sglang import platform
    from anchortp_sglang.recovery.zygote import die_with_parent, serve, unfit_to_fork

    die_with_parent(parent)
    platform.install_stand_ins()
    from anchortp_sglang import plugin, preload  # these import SGLang, which needs the stand-ins
    from anchortp_sglang.recovery import wire

    preload.import_sglang()
    plugin.install_all(allow_drift=True)  # main has compared it already
    wire.register()
    reason = unfit_to_fork()
    if reason is not None:
        sys.exit(f"anchortp: the zygote cannot fork: {reason}")
    gc.collect()
    gc.freeze()
    serve(socket.socket(fileno=control_fd), parent)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
