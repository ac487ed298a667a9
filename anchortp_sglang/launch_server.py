"""``python -m anchortp_sglang.launch_server``: an SGLang server that survives the loss of ranks and devices."""

import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from anchortp_sglang import start_log
from anchortp_sglang.anchor.outside import remove_files
from anchortp_sglang.hooks import preload
from anchortp_sglang.hooks.flags import given_flags
from anchortp_sglang.options import AnchorOptions, print_help, split_argv
from anchortp_sglang.platforms.base import Platform, describe
from anchortp_sglang.recovery import ending
from anchortp_sglang.recovery.processes.zygote import tile_folder
from anchortp_sglang.startup import device, preflight
from anchortp_sglang.startup.hub import named_snapshot

log = logging.getLogger("anchortp_sglang")


def main(argv: Sequence[str]) -> None:
    """Serve until stopped. A refused start ends with a message on stderr and exit code 2."""
    ending.end_at_once_on_signals()
    try:
        options, rest = split_argv(argv)
        given = given_flags(rest)
        wants_help = "help" in given
        flags = {} if wants_help else given
        platform = device.choose_platform({"device": "cpu"} if wants_help else flags)
        defaults = device.prepare(platform, flags, options.overlap)
        if not wants_help:
            preflight.check_given(given, platform.rules)
            preflight.check_run_base(options.run_dir)
            snapshot = named_snapshot(given, lambda folder: preflight.check_model(given | {"model_path": folder}))
            rest += device.as_arguments(snapshot)
            given |= snapshot
            preflight.check_model(given)
            preload.leave_out_other_models(preflight.architectures(given))
    except ValueError as error:
        _refuse(error)
    if wants_help:
        print_help()
        return
    _serve(options, [*rest, *device.as_arguments(defaults.flags)], describe(defaults), platform)


def _serve(options: AnchorOptions, argv: list[str], settings: str, platform: Platform) -> None:
    started = time.monotonic()
    print("anchortp: importing SGLang (once, for all processes) …", file=sys.stderr, flush=True)
    ending.on_end(_remove_tile_folder)
    preload.import_sglang()
    from sglang.srt.server_args import prepare_server_args

    from anchortp_sglang.startup import start

    server_args = prepare_server_args(argv)
    log.info("anchortp: SGLang imported in %.1f s; %s", time.monotonic() - started, settings)
    start_log.step("SGLang is imported")
    try:
        runtime = start.start(server_args, options, platform, serves_http=True)
    except start.REFUSALS as error:
        _refuse(error)
    ending.on_end(runtime.close)
    try:
        _run_http_server(server_args, runtime, options)
    except start.START_FAILURES as error:
        print(f"anchortp: the server did not start: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    finally:
        ending.ignore_signals()
        runtime.close()
        from sglang.srt.utils import kill_process_tree

        kill_process_tree(os.getpid(), include_parent=False)


def _run_http_server(server_args: Any, runtime: Any, options: AnchorOptions) -> None:
    from sglang.srt.entrypoints import http_server

    from anchortp_sglang.admission.hooks import NotAdmitted, answer_not_admitted
    from anchortp_sglang.admission.ollama import answer_value_error
    from anchortp_sglang.http.middleware import AnchorMiddleware
    from anchortp_sglang.http.own_routes import guard

    def start_loop() -> None:
        start_log.step("HTTP is about to listen")
        tokenizer_manager = http_server._global_state.tokenizer_manager
        tokenizer_manager.auto_create_handle_loop()
        ending.drain_on_signals(tokenizer_manager.event_loop, tokenizer_manager, runtime.coordinator)

    runtime.coordinator.culprits.on_failed_start = lambda reason: _end_start(runtime, reason)
    http_server.app.add_middleware(
        AnchorMiddleware,
        coordinator=runtime.coordinator,
        tokenizer_manager=lambda: http_server._global_state.tokenizer_manager,
        on_startup=start_loop,
        allow_injection=options.allow_injection,
        max_body_bytes=int(options.max_body_mib * 2**20),
        allow_journals=options.allow_journals,
        metrics=_metrics(server_args, runtime),
    )
    guard(http_server.app)
    http_server.app.add_exception_handler(NotAdmitted, answer_not_admitted)
    http_server.app.add_exception_handler(ValueError, answer_value_error)
    http_server.launch_server(server_args)


def _remove_tile_folder() -> None:
    """Remove what cuda.tile would remove at a regular exit."""
    if (folder := tile_folder()) is not None:
        remove_files([folder])


def _end_start(runtime: Any, reason: str) -> None:
    """End a server whose ranks fail on its own first request, as stock SGLang does."""
    print(f"anchortp: the server did not start: {reason}", file=sys.stderr, flush=True)
    runtime.close()
    os._exit(1)


def _metrics(server_args: Any, runtime: Any) -> Any:
    """Make our series, if SGLang serves /metrics."""
    if not server_args.enable_metrics:
        return None
    from anchortp_sglang.http.metrics import Metrics

    metrics = Metrics()
    runtime.coordinator.recoveries.on_finished.append(metrics.observe)
    return metrics


def _refuse(error: Exception) -> NoReturn:
    print(f"anchortp: cannot start: {error}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
