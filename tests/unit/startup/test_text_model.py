"""A multimodal checkpoint is shown to SGLang as that of its language model."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from anchortp_sglang.startup.preflight import read_config
from anchortp_sglang.startup.text_model import remove, show_language_model, text_folder
from anchortp_sglang.testing.tiny_checkpoint import write_checkpoint


def test_the_folder_has_the_language_models_config_and_links_to_all_but_the_processor(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "whole", "qwen3_vl", num_layers=1)
    folder = text_folder(checkpoint)
    assert folder is not None
    assert json.loads((folder / "config.json").read_text()) == read_config(checkpoint) == read_config(folder)
    links = {path.name for path in folder.iterdir() if path.is_symlink()}
    assert links == {"model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert (folder / "model.safetensors").resolve() == checkpoint / "model.safetensors"
    remove(folder)
    assert not folder.exists()
    assert (checkpoint / "model.safetensors").exists()


def test_what_the_operator_changes_reaches_the_language_model(tmp_path: Path) -> None:
    """A change that SGLang would not apply to the text is in the folder; any other one is left to SGLang."""
    changes = '{"sliding_window": 128}'
    for family, in_folder in (("gemma3", False), ("gemma4", True)):
        checkpoint = write_checkpoint(tmp_path / family, family, num_layers=2)  # type: ignore[arg-type]
        given = SimpleNamespace(model_path=str(checkpoint), served_model_name=None, json_model_override_args=changes)
        folder = show_language_model(given)
        assert folder is not None
        assert read_config(checkpoint, changes)["sliding_window"] == 128
        assert (read_config(folder)["sliding_window"] == 128) == in_folder
        assert given.json_model_override_args == ("{}" if in_folder else changes)
        remove(folder)
    with pytest.raises(ValueError, match="cannot change text_config"):
        read_config(checkpoint, '{"text_config": {"num_hidden_layers": 3}}')


def test_a_chat_template_of_a_processor_is_given_to_the_tokenizer(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "whole", "gemma3", num_layers=1)
    (checkpoint / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    folder = text_folder(checkpoint)
    assert folder is not None
    assert (folder / "chat_template.jinja").read_text() == "{{ messages }}"
    remove(folder)


def test_a_language_model_needs_no_such_folder(tmp_path: Path) -> None:
    assert text_folder(write_checkpoint(tmp_path, "qwen3", num_layers=1)) is None
