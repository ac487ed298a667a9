"""Settings of SGLang with which ranks on GPUs can be replaced, worked out from what the user has set. Pure."""

from collections.abc import Mapping

from anchortp_sglang.platforms.base import Defaults


def cuda_defaults(flags: Mapping[str, object], environ: Mapping[str, str], shared: bool) -> Defaults:
    """Work out settings for ``--device cuda``. Values in ``flags`` or ``environ`` are the user's and stay.

    ``shared``: several ranks run on one GPU.
    """
    env = _ENVIRONMENT | (_SHARED_ENVIRONMENT if shared else {})
    wanted = _FLAGS | (_SHARED_FLAGS if shared else {})
    return Defaults(
        {name: value for name, value in env.items() if name not in environ},
        {name: value for name, value in wanted.items() if name not in flags},
        title="GPUs, set for replaceable ranks",
    )


_FLAGS: dict[str, object] = {
    "device": "cuda",
}

_SHARED_FLAGS: dict[str, object] = {
    "disable_custom_all_reduce": True,  # it exchanges CUDA IPC handles between GPUs
}

_ENVIRONMENT = {
    # torch.cuda.is_available() runs when SGLang is imported, and otherwise calls cuInit: no fork after that.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    # numa_utils wraps the executable of spawned ranks; ours are forked.
    "SGLANG_NUMA_BIND_V2": "0",
    # Ordinals in the order of the bus, in SGLang, NVML and here.
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    # bootstrap._check_tp_memory_balance: anchors hold different shares, and hold them when ranks start.
    "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0",
    # As on the CPU (platforms/cpu/environment.py).
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "SGLANG_USE_MESSAGE_QUEUE_BROADCASTER": "0",
}

_SHARED_ENVIRONMENT = {
    "SGLANG_NCCL_SO_PATH": "/nonexistent",  # turns pynccl off: NCCL by default refuses a shared GPU
}
