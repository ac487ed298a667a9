"""Checks of a server's LoRA flags and adapters at its start, and what is inferred from them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from anchortp_sglang.anchor.launch import RunDir, remove_run_dir
from anchortp_sglang.planning.layout.shards import shard_layout
from anchortp_sglang.planning.model.axes import ModelAxes, UnsupportedModel, has_unlike_layers
from anchortp_sglang.planning.ownership.ownership import Ownership
from anchortp_sglang.recovery.requests.adapter_copies import AdapterCopies, Files, adapter_files, adapter_folder

_SERVED = {"q_head", "kv_head", "mlp", "vocab"}
"""Axes of models whose adapters are cut by our rules."""
_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The modules that PEFT's "all-linear" names in models of these axes."""


def check_adapters(model: ModelAxes, rotate_heads: bool) -> None:
    """Refuse LoRA for models that it was not made for. Raises UnsupportedModel, or ValueError for a flag."""
    if model.latent_kv or model.axes.keys() - _SERVED or has_unlike_layers(model):
        raise UnsupportedModel(
            f"--enable-lora: adapters of {model.architecture} are not supported, as it has experts, latent attention, "
            "or layers of several shapes; merge the adapter into the checkpoint"
        )
    if rotate_heads:
        raise ValueError(
            "--enable-lora with --anchor-rotate-heads is not supported: SGLang's buffers of adapters have one size for "
            "all layers; leave one of them out"
        )


def uses_adapters(view: Any) -> bool:
    """Return whether resolved ServerArgs ask for LoRA, as SGLang takes them."""
    return bool(view.enable_lora or (view.lora_paths and view.enable_lora is None))


def shapes_of(view: Any, adapters: Sequence[Any]) -> dict[str, Any]:
    """Return --max-lora-rank and --lora-target-modules, unless they are given, as SGLang infers them from ``adapters``.

    Raises ValueError if one cannot be read.
    """
    from sglang.srt.lora.lora_config import LoRAConfig

    ranks, modules = [0], set[str]()
    for adapter in adapters:
        try:
            adapter_files(Path(adapter.lora_path))
            config = LoRAConfig(adapter.lora_path)
            ranks.append(int(config.r))
            modules.update(_LINEAR if isinstance(config.target_modules, str) else config.target_modules)
        except Exception as error:  # files, JSON, the hub
            raise ValueError(
                f"--lora-paths: the adapter {adapter.lora_name} in {adapter.lora_path} cannot be read: {error!r}"
            ) from None
    shapes = {"max_lora_rank": max(ranks), "lora_target_modules": sorted(modules)} if adapters else {}
    shapes = {name: value for name, value in shapes.items() if not getattr(view, name)}
    if set(view.lora_target_modules or ()) == {"all"}:
        shapes["lora_target_modules"] = list(_LINEAR)  # SGLang would add embed_tokens and lm_head
    return shapes


def find_adapters(raw: Mapping[str, Any]) -> Sequence[Any]:
    """Return the LoRARefs of --lora-paths, whose paths are folders then. ``raw``: unresolved ServerArgs.

    Raises ValueError for a flag of LoRA, or an adapter that cannot be had.
    """
    from msgspec.structs import replace
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.server_args import ServerArgs

    record = ServerArgs(**raw)
    record.resolve_once()
    _resolve_flags(record)
    named = resolving_view(record).lora_paths or ()
    for number, adapter in enumerate(named):
        if adapter.lora_id in {other.lora_id for other in named[:number]}:
            raise ValueError(f"--lora-paths names the adapter {adapter.lora_name} twice")
    return [replace(adapter, lora_path=str(adapter_folder(adapter.lora_path))) for adapter in named]


def keep_copies(run_dir: RunDir, adapters: Sequence[Any], files: Sequence[Files], readers: int) -> AdapterCopies:
    """Keep copies of the adapters of --lora-paths. Raises ValueError, and removes the directory, if it has no room."""
    try:
        copies = AdapterCopies(run_dir.path / "adapters", readers)
        for adapter, its_files in zip(adapters, files, strict=True):
            copies.keep(adapter.lora_id, adapter.lora_path, its_files, stays=True)
    except OSError as error:
        remove_run_dir(run_dir)
        raise ValueError(f"adapters cannot be shown in the run directory {run_dir.path}: {error}") from None
    return copies


def read_copies(record: Any, copies: AdapterCopies) -> None:
    """Let a record of ranks, resolved ServerArgs, name the copies of the adapters of --lora-paths."""
    from msgspec.structs import replace
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    _resolve_flags(record)
    shown = [replace(ref, lora_path=copies.path(ref.lora_id)) for ref in resolving_view(record).lora_paths or ()]
    declare_resolution(record, "anchortp", lora_paths=shown)


def _resolve_flags(record: Any) -> None:
    """Resolve the flags of LoRA as SGLang does when it launches. Raises ValueError for one."""
    from sglang.srt.arg_groups.lora_hook import check_lora_server_args

    try:
        check_lora_server_args(record)
    except AssertionError as error:
        raise ValueError(str(error)) from None


def adapter_bytes(
    model: ModelAxes, ownership: Ownership, raw: Mapping[str, Any], adapters: Iterable[Any], generations: int
) -> int:
    """Return the memory of all ranks' buffers of adapters, and of ``adapters`` in main and, whole, in each rank.

    ``raw``: ServerArgs with ``shapes_of``. ``generations``: how many there are at a time, with a standby. Buffers are
    LoRAMemoryPool's: for each adapted module the parts A and B of --max-loras-per-batch adapters, cut like its weight.
    """
    from sglang.srt.lora.utils import get_normalized_target_modules, get_stacked_multiply

    targets = get_normalized_target_modules(raw["lora_target_modules"])
    numbers = 0
    for rank in range(ownership.tp_size):
        for placed in shard_layout(model, ownership, rank).params:
            module = placed.name.removesuffix(".weight").rpartition(".")[2]
            if module in targets and len(placed.shape) == 2:
                rows, columns = placed.shape
                numbers += rows + get_stacked_multiply(module) * columns
    buffers = numbers * raw["max_lora_rank"] * raw["max_loras_per_batch"] * model.dtype_bytes
    files = sum(path.stat().st_size for adapter in adapters for path in adapter_files(Path(adapter.lora_path)))
    return files + generations * (buffers + files * ownership.tp_size)


def adapter_identity(adapters: Iterable[Any]) -> Iterator[str]:
    """Yield what tells adapters apart whose KV anchors hold: names, and sizes and times of their files.

    ``adapters``: SGLang's LoRARef.
    """
    for adapter in adapters:
        yield f"{adapter.lora_name}={adapter.lora_path}"
        for path in adapter_files(Path(adapter.lora_path)):
            stat = path.stat()
            yield f"{path.name} {stat.st_size} {stat.st_mtime_ns}"
