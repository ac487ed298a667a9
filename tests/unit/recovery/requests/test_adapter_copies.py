"""A copy of an adapter stays what it was, whatever becomes of its files and of the links to it."""

from __future__ import annotations

import gc
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from anchortp_sglang.recovery.requests.adapter_copies import AdapterCopies, adapter_files, adapter_folder, copy_adapter

WEIGHTS = {"lora_A": torch.arange(6.0).reshape(2, 3)}
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / CONFIG).write_text('{"r": 2}')
    for not_read in ("README.md", "tokenizer.json", "training_args.bin", "optimizer.pt"):
        (folder / not_read).write_text("not for a server")
    save_file(WEIGHTS, folder / TENSORS)
    return folder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@pytest.fixture
def copies(run_dir: Path) -> AdapterCopies:
    return AdapterCopies(run_dir / "adapters")


def keep(copies: AdapterCopies, name: str, source: Path) -> None:
    copies.keep(name, str(source), copy_adapter(str(source), 4))


def shown(copies: AdapterCopies, name: str) -> Path:
    folder = Path(copies.path(name))
    assert sorted(os.listdir(folder)) == [CONFIG, TENSORS]
    assert (folder / CONFIG).read_text() == '{"r": 2}'
    assert torch.equal(load_file(folder / TENSORS)["lora_A"], WEIGHTS["lora_A"])
    return folder


def open_files() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_a_copy_stays_as_it_was(copies: AdapterCopies, source: Path) -> None:
    keep(copies, "a", source)
    assert shown(copies, "a").stat().st_mode & 0o777 == 0o700
    save_file({"lora_A": torch.zeros(2, 3)}, source / TENSORS)
    shown(copies, "a")
    shutil.rmtree(source)
    folder = shown(copies, "a")
    with pytest.raises(PermissionError):
        os.truncate(folder / CONFIG, 0)


def test_links_that_have_vanished_are_made_again(copies: AdapterCopies, source: Path, run_dir: Path) -> None:
    keep(copies, "a", source)
    keep(copies, "b", source)
    shutil.rmtree(run_dir / "adapters")
    copies.show()
    shown(copies, "a")
    (shown(copies, "b") / CONFIG).unlink()
    copies.show()
    shown(copies, "b")


def test_the_run_directory_is_made_by_its_keeper_alone(copies: AdapterCopies, source: Path, run_dir: Path) -> None:
    keep(copies, "a", source)
    shutil.rmtree(run_dir)
    copies.show()
    assert not run_dir.exists()
    with pytest.raises(FileNotFoundError):
        keep(copies, "b", source)
    run_dir.mkdir()
    copies.show()
    shown(copies, "a")


def test_links_of_a_killed_server_are_not_taken_for_new_ones(run_dir: Path, source: Path) -> None:
    stale = run_dir / "adapters" / "a"
    stale.mkdir(parents=True)
    for name in (CONFIG, TENSORS):
        (stale / name).symlink_to("/proc/1/fd/3")
    copies = AdapterCopies(run_dir / "adapters")
    keep(copies, "a", source)
    shown(copies, "a")


def test_memory_is_freed(copies: AdapterCopies, source: Path) -> None:
    before = open_files()
    keep(copies, "a", source)
    keep(copies, "b", source)
    assert open_files() == before + 4
    copies.discard("a")
    copies.discard("a")
    copies.discard("never there")
    assert not Path(copies.path("a")).exists()
    assert open_files() == before + 2
    copies.close()
    assert open_files() == before


def test_paths_are_told_as_they_were_given(copies: AdapterCopies, source: Path) -> None:
    keep(copies, "a", source)
    assert copies.source(copies.path("a")) == str(source)
    assert copies.source("/elsewhere/a") == "/elsewhere/a"
    assert copies.source(copies.path("b")) == copies.path("b")


def test_threads_do_not_disturb_one_another(copies: AdapterCopies, source: Path) -> None:
    files, errors, stop = copy_adapter(str(source), 4), [], threading.Event()

    def repeat(work: object) -> None:
        try:
            while not stop.is_set():
                work()  # type: ignore[operator]
        except BaseException as error:
            errors.append(error)
            raise

    def change(name: str) -> None:
        copies.keep(name, "it", files)
        copies.discard(name)

    threads = [threading.Thread(target=repeat, args=(copies.show,)) for _ in range(2)]
    threads += [threading.Thread(target=repeat, args=(lambda name=name: change(name),)) for name in "ab"]
    for thread in threads:
        thread.start()
    stop.wait(0.5)
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors


@pytest.mark.parametrize(
    "spoil, text",
    [
        (lambda folder: (folder / CONFIG).unlink(), "no adapter_config.json"),
        (lambda folder: (folder / TENSORS).write_bytes(b"short"), "cannot be read"),
        (lambda folder: os.truncate(folder / TENSORS, 1 << 40), "cannot be read"),  # zeros that take no disk
        (lambda folder: (folder / TENSORS).chmod(0), "cannot be read" if os.geteuid() else None),
        (lambda folder: [(folder / f"{n}.safetensors").touch() for n in range(100)], "101 files of weights"),
        (lambda folder: [path.unlink() for path in folder.iterdir() if path.name != CONFIG], "0 files of weights"),
        (lambda folder: ((folder / TENSORS).unlink(), os.truncate(folder / "training_args.bin", 1 << 40)), "5 times"),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_adapter_is_refused(spoil: object, text: str | None, source: Path) -> None:
    spoil(source)  # type: ignore[operator]
    before = open_files()
    if text is not None:
        with pytest.raises(ValueError, match=text):
            copy_adapter(str(source), 4)
        assert open_files() == before


def test_weights_are_the_first_kind_that_is_there(source: Path) -> None:
    (source / "added_tokens.json").write_text(json.dumps({}))
    assert [path.name for path in adapter_files(source)] == [CONFIG, "added_tokens.json", TENSORS]
    (source / TENSORS).unlink()
    os.mkfifo(source / "pipe.bin")
    assert [path.name for path in adapter_files(source)] == [CONFIG, "added_tokens.json", "training_args.bin"]


def test_what_is_neither_a_folder_nor_to_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("nobody/nothing", "/no/such/folder", ""):
        with pytest.raises(ValueError, match="is no folder"):
            adapter_folder(name)


def test_what_new_ranks_need_is_not_discarded(copies: AdapterCopies, source: Path) -> None:
    copies.keep("a", "it", copy_adapter(str(source), 1), stays=True)
    assert not copies.discard("a")
    shown(copies, "a")
    assert copies.discard("b")
