"""Settings of SGLang on a machine without a GPU, worked out from what the user has set. Pure."""

from collections.abc import Mapping, Sequence

from anchortp_sglang.platforms.base import Defaults

_THREADS_BIND = "SGLANG_CPU_OMP_THREADS_BIND"


def cpu_defaults(
    flags: Mapping[str, object],
    environ: Mapping[str, str],
    tp_size: int,
    cores: Sequence[int],
    quota: float | None = None,
    memory_bytes: int | None = None,
) -> Defaults:
    """Work out settings for ``--device cpu``. Values in ``flags`` or ``environ`` are the user's and stay.

    ``flags``: those that were given, by ServerArgs field name. ``tp_size``: the largest that will run; a later, smaller
    one uses the first of the thread bindings. ``cores``: ids that the process may run on,
    sorted(os.sched_getaffinity(0)). ``quota``: cores' worth of time it may use (``cgroups.cpu_quota``).
    ``memory_bytes``: what its cgroup leaves it, if less than the host has.

    Raises ValueError if the flags ask for another device, or if the user's thread bindings are too few.
    """
    if flags.get("device", "cpu") != "cpu":
        raise ValueError(f"CPU defaults asked for, but --device is {flags['device']}")
    if tp_size < 1 or not cores:
        raise ValueError(f"need a rank and a core at least, got tp_size {tp_size}, cores {list(cores)}")
    _check_bindings(environ.get(_THREADS_BIND), tp_size)
    env = {name: value for name, value in _environment(tp_size, cores, quota).items() if name not in environ}
    wanted = _FLAGS if memory_bytes is None else _FLAGS | {"chunked_prefill_size": _chunk(memory_bytes)}
    added = {name: value for name, value in wanted.items() if name not in flags}
    return Defaults(env, added, title="no GPU, set for CPU")


_FLAGS: dict[str, object] = {
    "device": "cpu",
    # Stock picks intel_amx and falls back to this one where AMX is missing (overrides.py,
    # _attention_backend_platform_fallbacks); intel_amx calls sgl_kernel.
    "attention_backend": "torch_native",
    # torch.cpu streams do nothing: with overlap on, every result only comes one step later (--anchor-overlap on).
    "disable_overlap_schedule": True,
    # Otherwise rank 0 polls its sockets without pause (Scheduler.event_loop_normal) and keeps all ranks busy.
    "sleep_on_idle": True,
    # Otherwise GroupCoordinator.__init__ tries it and logs a warning for each group (dispatch_custom_allreduce).
    "disable_custom_all_reduce": True,
    # The only backend of adapters without triton.
    "lora_backend": "torch_native",
}


def _chunk(memory_bytes: int) -> int:
    """Return the tokens of a prefill, whose activations need memory.

    As memory_hook._handle_gpu_memory_settings would choose if it used the cgroup's memory instead of the host's.
    """
    return next((tokens for gib, tokens in ((20, 2048), (60, 4096), (90, 8192)) if memory_bytes < gib << 30), 16384)


def _environment(tp_size: int, cores: Sequence[int], quota: float | None) -> dict[str, str]:
    usable = len(cores) if quota is None else min(len(cores), int(quota))
    return {
        # platforms._is_cpu_available, utils.common.is_cpu
        "SGLANG_USE_CPU_ENGINE": "1",
        # PyNcclCommunicator is off if its library does not load; otherwise it requires a CUDA device.
        "SGLANG_NCCL_SO_PATH": "/nonexistent",
        # numa_utils.init_threads_binding needs an entry for each rank (indexed by gpu_id), or a NUMA node for each. On
        # x86 without AMX it only checks: nothing is bound (bootstrap._init_cpu_threads_env).
        _THREADS_BIND: _bindings(tp_size, cores),
        # ModelRunner.load_model leaves torch's thread count alone on CPU. More threads than a quota of CPU time use it
        # up early in each period, and then all of them stand still.
        "OMP_NUM_THREADS": str(max(1, usable // tp_size)),
        # numpy's pool is never needed, and a process with threads cannot be forked safely.
        "OPENBLAS_NUM_THREADS": "1",
        # vocab_parallel_embedding, sampler, penalizers are @torch.compile: seconds in every rank that starts.
        "TORCHDYNAMO_DISABLE": "1",
        # Tokenizer threads compete with the ranks; tokenizer_manager sets it for some models only.
        "TOKENIZERS_PARALLELISM": "false",
        # Otherwise GroupCoordinator.__init__ makes one in /dev/shm, which a killed rank leaves behind, and starts a
        # resource tracker; it is not used.
        "SGLANG_USE_MESSAGE_QUEUE_BROADCASTER": "0",
        # bootstrap._check_tp_memory_balance compares the host's free memory as seen at different moments.
        "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0",
    }


def _bindings(tp_size: int, cores: Sequence[int]) -> str:
    """Return entries split by "|", one a rank, each a list of core ids: disjoint while there are enough cores."""
    width = len(cores) // tp_size
    if width == 0:
        return "|".join(str(cores[rank % len(cores)]) for rank in range(tp_size))
    shares = (cores[rank * width : (rank + 1) * width] for rank in range(tp_size))
    return "|".join(",".join(map(str, share)) for share in shares)


def _check_bindings(given: str | None, tp_size: int) -> None:
    # init_threads_binding: "all" stands for one NUMA node a rank, else the rank's index must have an entry.
    entries = tp_size if given in (None, "all") else given.count("|") + 1
    if entries < tp_size:
        raise ValueError(f"{_THREADS_BIND}={given} has {entries} entries for {tp_size} ranks, each needs one")
