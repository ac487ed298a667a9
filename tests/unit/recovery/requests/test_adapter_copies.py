"""What a copy of an adapter shows, whatever becomes of its files and of the links to it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from anchortp_sglang.recovery.requests.adapter_copies import AdapterCopies, adapter_files

WEIGHTS = {"lora_A": torch.arange(6.0).reshape(2, 3)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"r": 2}')
    (folder / "README.md").write_text("not for a server")
    save_file(WEIGHTS, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def copies(tmp_path: Path) -> AdapterCopies:
    return AdapterCopies(tmp_path / "run" / "adapters")


def shown(copies: AdapterCopies, name: str) -> Path:
    folder = Path(copies.path(name))
    assert sorted(os.listdir(folder)) == ["adapter_config.json", "adapter_model.safetensors"]
    assert (folder / "adapter_config.json").read_text() == '{"r": 2}'
    assert torch.equal(load_file(folder / "adapter_model.safetensors")["lora_A"], WEIGHTS["lora_A"])
    return folder


def test_a_copy_stays_as_it_was(copies: AdapterCopies, source: Path) -> None:
    copies.add("a", str(source))
    shown(copies, "a")
    save_file({"lora_A": torch.zeros(2, 3)}, source / "adapter_model.safetensors")
    shown(copies, "a")
    shutil.rmtree(source)
    folder = shown(copies, "a")
    with pytest.raises(PermissionError):
        os.truncate(folder / "adapter_config.json", 0)


def test_links_that_have_vanished_are_made_again(copies: AdapterCopies, source: Path) -> None:
    copies.add("a", str(source))
    copies.add("b", str(source))
    shutil.rmtree(Path(copies.path("a")).parent)
    copies.show()
    shown(copies, "a")
    (shown(copies, "b") / "adapter_config.json").unlink()
    copies.show()
    shown(copies, "b")


def test_memory_is_freed(copies: AdapterCopies, source: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    copies.add("a", str(source))
    assert len(os.listdir("/proc/self/fd")) == before + 2
    copies.discard("a")
    copies.discard("a")
    copies.discard("never there")
    assert len(os.listdir("/proc/self/fd")) == before
    assert not Path(copies.path("a")).exists()


@pytest.mark.parametrize(
    "missing, text", [("adapter_config.json", "no adapter_config.json"), ("adapter_model.safetensors", "no file of")]
)
def test_a_folder_that_is_no_adapter_is_refused(copies: AdapterCopies, source: Path, missing: str, text: str) -> None:
    (source / missing).unlink()
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ValueError, match=text):
        copies.add("a", str(source))
    assert os.listdir("/proc/self/fd") == before


def test_what_is_neither_a_folder_nor_to_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("nobody/nothing", "/no/such/folder", ""):
        with pytest.raises(ValueError, match="is no folder"):
            adapter_files(name)
