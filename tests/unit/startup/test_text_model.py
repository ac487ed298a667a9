"""A multimodal checkpoint is shown to SGLang as that of its language model."""

import json
from pathlib import Path

from anchortp_sglang.startup.preflight import read_config
from anchortp_sglang.startup.text_model import remove, text_folder
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


def test_a_chat_template_of_a_processor_is_given_to_the_tokenizer(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "whole", "gemma3", num_layers=1)
    (checkpoint / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    folder = text_folder(checkpoint)
    assert folder is not None
    assert (folder / "chat_template.jinja").read_text() == "{{ messages }}"
    remove(folder)


def test_a_language_model_needs_no_such_folder(tmp_path: Path) -> None:
    assert text_folder(write_checkpoint(tmp_path, "qwen3", num_layers=1)) is None
