"""LoRA flags and adapters are checked, and their memory is counted, before anything is made for them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from planning_cases import model
from safetensors.numpy import save_file

from anchortp_sglang.planning.ownership.ownership import split
from anchortp_sglang.startup.adapters import adapter_bytes, find_adapters, shapes_of

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write(folder: Path, rank: int = 4, modules: Any = ("q_proj", "v_proj")) -> Path:
    folder.mkdir()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": modules}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({"a": np.zeros(100, np.float32)}, folder / "adapter_model.safetensors")
    return folder


def raw(*paths: Any, **changed: Any) -> dict[str, Any]:
    import msgspec
    from sglang.srt.server_args import ServerArgs

    made = ServerArgs(model_path="none", device="cpu", load_format="dummy", lora_paths=list(paths) or None, **changed)
    return dict(msgspec.structs.asdict(made))


def refs(*folders: Path) -> list[Any]:
    return [SimpleNamespace(lora_name=folder.name, lora_path=str(folder)) for folder in folders]


def view(rank: int | None = None, modules: Any = None) -> Any:
    return SimpleNamespace(max_lora_rank=rank, lora_target_modules=modules)


def test_shapes_are_those_of_the_adapters_unless_they_are_given(tmp_path: Path) -> None:
    adapters = refs(write(tmp_path / "a"), write(tmp_path / "b", 16, ["down_proj"]))
    modules = ["down_proj", "q_proj", "v_proj"]
    assert shapes_of(view(), adapters) == {"max_lora_rank": 16, "lora_target_modules": modules}
    assert shapes_of(view(64, ["q_proj"]), adapters) == {}
    assert shapes_of(view(64, {"all"}), ()) == {"lora_target_modules": ALL}
    assert shapes_of(view(None, {"all"}), adapters) == {"max_lora_rank": 16, "lora_target_modules": ALL}
    assert shapes_of(view(8, ["q_proj"]), ()) == {}


@pytest.mark.parametrize("spoiled", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_that_cannot_be_read_is_named(spoiled: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    (folder / spoiled).write_text("{")
    with pytest.raises(ValueError, match=r"the adapter a in .* cannot be read"):
        shapes_of(view(), refs(folder))


@pytest.mark.parametrize("width", [1, 3, 4])
@pytest.mark.parametrize("generations", [1, 2])
def test_memory_is_that_of_buffers_and_files(width: int, generations: int, tmp_path: Path) -> None:
    axes, folder = model(), write(tmp_path / "a")
    shapes = {"lora_target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"], "max_lora_rank": 4}
    found = adapter_bytes(
        axes, split(axes, range(width), None), shapes | {"max_loras_per_batch": 3}, refs(folder), generations
    )
    hidden, qkv, mlp = 8, (12 + 2 * 4) * 2, 1040
    # Of modules that are cut by rows each rank has all of A, of the others all of B.
    of_qkv = 3 * hidden * width + qkv
    of_down = mlp + hidden * width
    files = sum(path.stat().st_size for path in folder.iterdir())
    assert found == files + generations * (2 * 3 * 4 * 4 * (of_qkv + of_down) + width * files)


def test_names_become_folders_and_none_is_there_twice(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    (found,) = find_adapters(raw(f"name={folder}"))
    assert (found.lora_name, found.lora_path) == ("name", str(folder))
    with pytest.raises(ValueError, match="names the adapter name twice"):
        find_adapters(raw(f"name={folder}", f"name={folder}"))
    with pytest.raises(ValueError, match="is no folder"):
        find_adapters(raw(f"name={tmp_path / 'none'}"))
    with pytest.raises(ValueError, match="max-lora-rank"):
        find_adapters(raw(enable_lora=True))
