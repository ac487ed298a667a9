"""What SGLang must be told so that its ranks can be replaced on GPUs, worked out from what the user said. Pure."""

from collections.abc import Mapping

from anchortp_sglang.platforms.base import Defaults


def cuda_defaults(flags: Mapping[str, object], environ: Mapping[str, str], shared: bool) -> Defaults:
    """Settings for ``--device cuda``. Whatever ``flags`` or ``environ`` holds already is the user's and stays.

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
    # The slot table is committed when a step is known to be complete; with overlap the next one runs already.
    "disable_overlap_schedule": True,
    # As on the CPU (platforms/cpu/environment.py).
    "grammar_backend": "none",
}

_SHARED_FLAGS: dict[str, object] = {
    "disable_custom_all_reduce": True,  # it exchanges CUDA IPC handles between GPUs
}

_ENVIRONMENT = {
    # torch.cuda.is_available() is called when SGLang is imported, and else calls cuInit: no fork after that.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    # numa_utils wraps the executable of spawned ranks: ours are forked.
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
    "SGLANG_NCCL_SO_PATH": "/nonexistent",  # pynccl is off if its library does not load; NCCL refuses a shared GPU
}
