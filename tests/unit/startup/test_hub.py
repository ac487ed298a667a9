"""A model is named by its repository: the cache of the Hugging Face hub, as its library lays it out."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from anchortp_sglang.startup import hub

NAME = "owner/tiny"
COMMITS = {"main": "a" * 40, "v2": "b" * 40}


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def cache(place: Path, files: dict[str, str]) -> Path:
    """A cache with two revisions of one repository: snapshots whose files are links to blobs."""
    repository = place / "models--owner--tiny"
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    for revision, commit in COMMITS.items():
        (repository / "refs" / revision).write_text(commit)
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for name, text in files.items():
            blob = repository / "blobs" / f"{revision}-{name}"
            blob.write_text(text)
            (snapshot / name).symlink_to(blob)
    return place


WHOLE = {"config.json": "{}", "model.safetensors": "x"}
INDEX = {"config.json": "{}", "model.safetensors.index.json": json.dumps({"weight_map": {"a": "1.safetensors"}})}


@pytest.mark.parametrize("files", [WHOLE, INDEX | {"1.safetensors": "x"}], ids=["one file", "an index"])
@pytest.mark.parametrize("revision", [None, "main", "v2", COMMITS["v2"]])
def test_a_snapshot_in_the_cache_is_the_model(tmp_path, files, revision):
    given = {"model_path": NAME, "download_dir": str(cache(tmp_path, files))}
    given |= {} if revision is None else {"revision": revision}
    commit = COMMITS.get(revision or "main", revision)
    folder = tmp_path / "models--owner--tiny" / "snapshots" / commit
    assert hub.named_snapshot(given) == {"model_path": str(folder), "served_model_name": NAME}
    assert hub.named_snapshot(given | {"served_model_name": "mine"})["served_model_name"] == "mine"


@pytest.mark.parametrize("files", [{}, {"config.json": "{}"}, INDEX], ids=["nothing", "config", "no shard"])
def test_one_that_is_not_complete_is_not_used_and_offline_nothing_is_downloaded(tmp_path, files):
    given = {"model_path": NAME, "download_dir": str(cache(tmp_path, files))}
    with pytest.raises(ValueError, match=r"owner/tiny is no folder, .* HF_HUB_OFFLINE forbids a download"):
        hub.named_snapshot(given)


@pytest.mark.parametrize("given", [{}, {"model_path": "/no/where"}, {"model_path": "a/b/c"}, {"model_path": "name"}])
def test_what_names_no_repository_is_left_as_it_is(given):
    assert hub.named_snapshot(given) == {}


def test_a_folder_comes_before_a_repository(tmp_path, monkeypatch):
    (tmp_path / "owner" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.named_snapshot({"model_path": NAME}) == {}


def test_a_download_that_fails_says_why(tmp_path, monkeypatch):
    """The process that downloads is told of a hub where nobody listens."""
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub, "_cached", lambda about: None)
    with pytest.raises(ValueError, match=r"its repository could not be downloaded \(.+\)"):
        hub.named_snapshot({"model_path": NAME, "download_dir": str(tmp_path)})


def test_what_a_download_brings_is_used(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    ran = []

    def run(command, **_):
        ran.append(command)
        cache(tmp_path, WHOLE)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    snapshot = hub.named_snapshot({"model_path": NAME, "download_dir": str(tmp_path), "revision": "v2"})
    assert snapshot["model_path"].endswith(COMMITS["v2"])
    ((python, _, _, about),) = ran
    assert python == sys.executable
    assert json.loads(about)["repo_id"] == NAME and "*.safetensors" in json.loads(about)["allow_patterns"]
