"""A byte-level BPE tokenizer of any size, for checkpoints of random weights.

Every id below `vocab_size` decodes to text, because random weights emit any id. No merge touches a byte above 0x7f, so
a multi-byte UTF-8 character spans as many tokens as it has bytes: the hardest case for a stream, which must send whole
characters.
"""

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase, digits
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT, TURN_START, TURN_END, PAD = SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|pad|>",
)
SMALLEST_VOCAB = 256 + len(SPECIAL_TOKENS)

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

_PARTS = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{- message.content }}{%- else %}{%- for part in message.content %}"
    "{{- part.text if part.type == 'text' else '<image>' }}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""Chat template of multimodal models: a message's content is a text, or a list of parts."""

_CORPUS = """
A server that streams tokens must go on when one of its devices dies. The weights of the lost device are
read again from storage, the other devices keep what they hold, and the stream goes on where it stopped.
The user sees a pause and then the rest of the answer; no token is lost and no token is sent twice.
Once upon a time there was a ship with four anchors. When the storm took one of them the captain said:
three anchors will hold us, if each of them takes over a part of the load. The crew moved as little chain
as they could, because moving chain takes time, and the wind did not wait for them.
Please write a short story about a river, a bridge and a young engineer who wants to cross the water.
What is the capital of France? How many days are there in a year? Why is the sky blue in the morning?
def add(first, second): return first + second
for index in range(10): print("number", index, "of", 10)
"""


def write_tokenizer(path: Path, vocab_size: int, max_length: int, *, parts_of_messages: bool = False) -> None:
    """Write tokenizer.json and tokenizer_config.json; special tokens take the last ids.

    ``parts_of_messages``: the chat template takes lists of texts and images, as in multimodal models.
    """
    build_tokenizer(vocab_size).save(str(path / "tokenizer.json"))
    config = _tokenizer_config(max_length) | ({"chat_template": _PARTS} if parts_of_messages else {})
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def build_tokenizer(vocab_size: int) -> Tokenizer:
    """Build a tokenizer with exactly `vocab_size` ids: 256 bytes, trained merges, filler merges, special tokens."""
    if vocab_size < SMALLEST_VOCAB:
        raise ValueError(f"vocab_size {vocab_size} is below {SMALLEST_VOCAB} (256 bytes and special tokens)")
    vocab, merges = _trained_merges(vocab_size - len(SPECIAL_TOKENS))
    for left, letter in _filler_merges(vocab):
        if len(vocab) == vocab_size - len(SPECIAL_TOKENS):
            break
        vocab[left + letter] = len(vocab)
        merges.append((left, letter))
    tokenizer = _byte_level(models.BPE(vocab=vocab, merges=merges))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def special_token_ids(vocab_size: int) -> dict[str, int]:
    return {token: vocab_size - len(SPECIAL_TOKENS) + i for i, token in enumerate(SPECIAL_TOKENS)}


def _byte_level(model: models.Model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def _trained_merges(size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS.splitlines(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [(left, right) for left, right in model["merges"]]


def _filler_merges(vocab: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Yield pairs whose concatenation is not yet in `vocab`, without end: each result is part of later pairs."""
    letters = ascii_lowercase + ascii_uppercase + digits
    words = [*letters]
    for position in count():
        for letter in letters:
            if words[position] + letter not in vocab:
                yield words[position], letter
            words.append(words[position] + letter)


def _tokenizer_config(max_length: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": TURN_END,
        "pad_token": PAD,
        "additional_special_tokens": [TURN_START],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "model_max_length": max_length,
    }
