"""A model is named by its repository: the cache of the Hugging Face hub, as its library lays it out."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub._tree_cache import TreeCacheEntry, write_tree_cache

from anchortp_sglang.startup import hub

NAME = "owner/tiny"
COMMITS = {"main": "a" * 40, "v2": "b" * 40}


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def cache(place: Path, files: dict[str, str]) -> Path:
    """A cache with two revisions of one repository: snapshots whose files are links to blobs.

    As after a download of these files alone, the library has noted that the repository has others.
    """
    repository = place / "models--owner--tiny"
    for folder in ("blobs", "refs"):
        (repository / folder).mkdir(parents=True, exist_ok=True)
    listed = {name: TreeCacheEntry(size=1, blob_id="0") for name in (*files, "README.md", ".gitattributes")}
    for commit in COMMITS.values():
        write_tree_cache(str(repository), commit, listed)
    for revision, commit in COMMITS.items():
        (repository / "refs" / revision).write_text(commit)
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            blob = repository / "blobs" / f"{revision}-{name}"
            blob.write_text(text)
            (snapshot / name).unlink(missing_ok=True)
            (snapshot / name).symlink_to(blob)
    return place


SMALL = {"config.json": "{}", "tokenizer.json": "{}"}
WHOLE = SMALL | {"model.safetensors": "x"}
INDEX = SMALL | {"model.safetensors.index.json": json.dumps({"weight_map": {"a": "1.safetensors"}})}


@pytest.mark.parametrize("files", [WHOLE, INDEX | {"1.safetensors": "x"}], ids=["one file", "an index"])
@pytest.mark.parametrize("revision", [None, "main", "v2", COMMITS["v2"]])
def test_a_snapshot_in_the_cache_is_the_model(tmp_path, files, revision):
    given = {"model_path": NAME, "download_dir": str(cache(tmp_path, files))}
    given |= {} if revision is None else {"revision": revision}
    commit = COMMITS.get(revision or "main", revision)
    folder = tmp_path / "models--owner--tiny" / "snapshots" / commit
    assert hub.named_snapshot(given) == {"model_path": str(folder), "served_model_name": NAME}
    assert hub.named_snapshot(given | {"served_model_name": "mine"})["served_model_name"] == "mine"


@pytest.mark.parametrize(
    "files",
    [{}, {"config.json": "{}"}, INDEX, {"config.json": "{}", "model.safetensors": "x"}],
    ids=["nothing", "config", "no shard", "no tokenizer"],
)
def test_one_that_is_not_complete_is_not_used_and_offline_nothing_is_downloaded(tmp_path, files):
    given = {"model_path": NAME, "download_dir": str(cache(tmp_path, files))}
    with pytest.raises(ValueError, match=r"owner/tiny is no folder, .*; HF_HUB_OFFLINE forbids a download"):
        hub.named_snapshot(given)


@pytest.mark.parametrize("given", [{}, {"model_path": "/no/where"}, {"model_path": "a/b/c"}, {"model_path": "name"}])
def test_what_names_no_repository_is_left_as_it_is(given):
    assert hub.named_snapshot(given) == {}


def test_a_folder_comes_before_a_repository(tmp_path, monkeypatch):
    (tmp_path / "owner" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.named_snapshot({"model_path": NAME}) == {}


def test_a_tokenizer_of_its_own_need_not_be_there(tmp_path):
    given = {"model_path": NAME, "download_dir": str(cache(tmp_path, {"config.json": "{}", "model.safetensors": "x"}))}
    assert hub.named_snapshot(given | {"tokenizer_path": "/t"})


def test_an_empty_revision_is_none(tmp_path):
    assert hub.named_snapshot({"model_path": NAME, "download_dir": str(cache(tmp_path, WHOLE)), "revision": ""})


def test_what_the_cache_cannot_give_is_no_traceback(tmp_path):
    with pytest.raises(ValueError, match="owner/tiny"):
        hub.named_snapshot({"model_path": NAME, "download_dir": str(cache(tmp_path, WHOLE)), "revision": ".."})


def test_models_of_another_hub_are_not_looked_for_here(monkeypatch):
    monkeypatch.setenv("SGLANG_USE_MODELSCOPE", "true")
    with pytest.raises(ValueError, match="with SGLANG_USE_MODELSCOPE give the folder"):
        hub.named_snapshot({"model_path": NAME})


def test_a_download_that_fails_says_why(tmp_path, monkeypatch, capfd):
    """The process that downloads is told of a hub where nobody listens."""
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"its repository could not be downloaded \(the reason is above\)"):
        hub.named_snapshot({"model_path": NAME, "download_dir": str(tmp_path)})
    assert "Error" in capfd.readouterr().err


def test_the_config_is_checked_before_the_weights_are_downloaded(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    files, asked = dict(WHOLE), []

    def run(command, **_):
        about = json.loads(command[-1])
        asked.append(about["allow_patterns"])
        only_config = about["allow_patterns"] == ["config.json"]
        cache(tmp_path, {"config.json": "{}"} if only_config else files)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    given = {"model_path": NAME, "download_dir": str(tmp_path), "revision": "v2"}
    seen = []
    with pytest.raises(ValueError, match="not this one"):
        hub.named_snapshot(given, refuse)
    assert asked == [["config.json"]]
    snapshot = hub.named_snapshot(given, seen.append)
    assert snapshot["model_path"].endswith(COMMITS["v2"]) and seen == [Path(snapshot["model_path"])]
    assert "*.safetensors" in asked[-1]


def refuse(folder):
    assert (folder / "config.json").exists()
    raise ValueError("not this one")


def test_random_weights_need_no_safetensors(tmp_path, monkeypatch):
    given = {"model_path": NAME, "download_dir": str(cache(tmp_path, SMALL)), "load_format": "dummy"}
    assert hub.named_snapshot(given)["served_model_name"] == NAME
    asked = []
    monkeypatch.setattr(hub, "_download", lambda about, patterns: asked.append(tuple(patterns)))
    with pytest.raises(ValueError, match="lacks safetensors or a tokenizer"):
        hub.named_snapshot(given | {"download_dir": str(cache(tmp_path / "b", {"config.json": "{}"}))})
    assert "*.safetensors" not in asked[-1] and "*.json" in asked[-1]
