"""The anchor process: ``python -m anchortp_sglang.anchor.server``.

``launch.start_anchor`` starts it. No input makes it fail: it ends by SIGTERM, by a ``Shutdown``, or if its controller
is dead and no other attaches in time. It then removes its files.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from anchortp_sglang.anchor import daemon
from anchortp_sglang.anchor.files import AnchorFiles
from anchortp_sglang.anchor.loop import Anchor, log
from anchortp_sglang.anchor.state import AnchorState
from anchortp_sglang.memory.arena_kinds import ARENA_KINDS, ArenaSpec, make_arena

__all__ = ["main"]

_LOG_TIMEOUT_S = 1.0  # an anchor that is just ending may still hold the device's log


def main(argv: Sequence[str] | None = None) -> None:
    """Become an anchor in a background process. Returns in that process when the anchor ends."""
    options = _parse(argv)
    files = AnchorFiles(os.path.abspath(options.run_dir), options.device)
    state = AnchorState(
        device=options.device,
        run_id=options.run_id,
        identity=options.identity,
        controller_pid=options.controller_pid,
        linger_s=options.linger_s,
        generation=options.generation,
    )
    daemon.daemonize()
    daemon.harden()
    try:
        daemon.use_log(files.log, _LOG_TIMEOUT_S)
    except BlockingIOError:
        sys.exit(f"device {options.device} already has an anchor in {files.run_dir}")
    files.remove()  # those of an anchor that was killed; the lock on the log says that none is alive
    try:
        _live(state, files, ArenaSpec(options.arena, options.arena_uuid, options.arena_bytes), options.ready_fd)
    finally:
        files.remove()


def _live(state: AnchorState, files: AnchorFiles, arena: ArenaSpec, ready_fd: int | None) -> None:
    anchor = Anchor(state, files, make_arena(arena))  # not before the forks are done: the driver does not survive them
    if ready_fd is not None:
        os.write(ready_fd, b"1")  # fails, and ends the anchor, if the starter has given up on it
        os.close(ready_fd)
    log(f"anchor of device {state.device}, run {state.run_id}, controller {state.controller_pid}")
    anchor.run()
    anchor.close()
    log("ended")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="anchortp-anchor", description="owns the memory of one device")
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--run-id", required=True)
    parser.add_argument("--device", type=int, required=True, help="device id; -1 for the host")
    parser.add_argument("--identity", required=True, help="identifies the model and ownership of the memory")
    parser.add_argument("--controller-pid", type=int, required=True)
    parser.add_argument("--linger-s", type=float, required=True)
    parser.add_argument("--generation", type=int, default=0)
    parser.add_argument("--arena", choices=ARENA_KINDS, default="memfd", help="kind of memory of its segments")
    parser.add_argument("--arena-uuid", default="", help="UUID of the GPU whose memory it owns")
    parser.add_argument("--arena-bytes", type=int, default=0, help="most bytes of GPU memory that it may allocate")
    parser.add_argument("--ready-fd", type=int, help="descriptor; gets one byte once the anchor answers")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
