"""``anchortp_sglang.Engine``: an sglang.Engine that survives the loss of ranks and devices."""

import os
from typing import Any

import msgspec

from anchortp_sglang.admission.checks import check_message
from anchortp_sglang.options import from_kwargs
from anchortp_sglang.startup import device
from anchortp_sglang.startup.hub import named_snapshot

MAX_TP_SIZE = 8

# SGLang reads its environment when imported, before the number of ranks is known: it is prepared for the most.
# Thread bindings set by the user are checked later, when the number is known.
_PLATFORM = device.choose_platform({"device": "cpu"})
device.prepare(_PLATFORM, {"tp_size": 1 if "SGLANG_CPU_OMP_THREADS_BIND" in os.environ else MAX_TP_SIZE})

from sglang.srt.entrypoints.engine import Engine as _StockEngine  # noqa: E402
from sglang.srt.server_args import ServerArgs  # noqa: E402

from anchortp_sglang.startup import start  # noqa: E402


class Engine(_StockEngine):
    """An ``sglang.Engine`` with ``anchor_*`` keyword arguments (AnchorOptions) beside SGLang's own.

    Raises ValueError for unsupported arguments. A process can have one, as hooks and coordinator are the process's.
    """

    def __init__(self, **kwargs: Any) -> None:
        options, rest = from_kwargs(kwargs)
        server_args = rest.get("server_args")
        tp_size = server_args.tp_size if server_args is not None else device.tp_size_of(rest)
        if tp_size > MAX_TP_SIZE:
            raise ValueError(f"tp_size is {tp_size}; an Engine takes at most {MAX_TP_SIZE}")
        if server_args is None:
            server_args = _record(rest, options.overlap)
        elif options.overlap != "auto":
            raise ValueError("anchor_overlap does not go with server_args: set its disable_overlap_schedule instead")
        for name, value in named_snapshot(msgspec.structs.asdict(server_args)).items():
            setattr(server_args, name, value)
        self._anchor_runtime: start.Runtime | None = start.start(server_args, options, _PLATFORM, serves_http=False)
        try:
            super().__init__(server_args=server_args)
        except BaseException:
            self.shutdown()
            raise

    def collective_rpc(self, method: str, **kwargs: Any) -> None:
        """Raise ValueError: such a call bypasses TokenizerManager, and an error in it ends the rank."""
        raise ValueError(check_message("RpcReqInput"))

    def shutdown(self) -> None:
        """End all processes and free their memory. May be called twice."""
        runtime, self._anchor_runtime = self._anchor_runtime, None
        if runtime is not None:
            runtime.coordinator.stop()
            super().shutdown()
            runtime.close()


def _record(kwargs: dict[str, Any], overlap: str) -> Any:
    if kwargs.get("device") not in (None, _PLATFORM.rules.device):
        raise ValueError(
            f"--device {kwargs['device']} is not supported in an Engine; use anchortp_sglang.launch_server"
        )
    flags = device.prepare(_PLATFORM, kwargs, overlap).flags
    return ServerArgs(**({"log_level": "error"} | flags | kwargs))
