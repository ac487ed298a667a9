"""A server without a home, or with one that cannot be written, has its caches elsewhere."""

import os
import tempfile
from pathlib import Path

import pytest

from anchortp_sglang.startup.folders import home_defaults


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_home_that_takes_caches_stays(tmp_path, temporary):
    assert home_defaults({"HOME": str(tmp_path)}) == {}
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("home", ["/proc/nobody", "/dev/null", "relative", "~"])
def test_any_other_is_replaced_by_a_private_folder(temporary, home):
    chosen = Path(home_defaults({"HOME": home})["HOME"])
    assert chosen.parent == temporary
    assert chosen.stat().st_mode & 0o777 == 0o700
    assert home_defaults({"HOME": home}) == {"HOME": str(chosen)}


def test_a_user_that_nobody_knows_has_one_too(temporary, monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as it does without HOME and passwd entry
    assert Path(home_defaults({})["HOME"]).parent == temporary


def test_without_a_folder_for_temporary_files_it_is_refused(monkeypatch):
    def none_usable():
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", none_usable)
    with pytest.raises(ValueError, match="set TMPDIR"):
        home_defaults({"HOME": "/dev/null"})
