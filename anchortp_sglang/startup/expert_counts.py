"""Reads how often each expert was chosen, from a file that SGLang's ``--init-expert-location`` takes.

SGLang's expert distribution recorder writes it: a .pt or .json with ``logical_count``, of shape (layers, experts) or
(steps, layers, experts). The flag also takes that JSON itself (``compute_initial_expert_location_metadata``,
eplb/expert_location.py).
"""

import json
import pickle
from pathlib import Path
from typing import Any

import torch

from anchortp_sglang.planning.model.axes import ModelAxes
from anchortp_sglang.planning.placement.expert_load import ExpertCounts

FLAG = "--init-expert-location"
NONE = "trivial"
"""The flag's default."""


def read_expert_counts(text: str, model: ModelAxes) -> ExpertCounts:
    """Read the counts of each layer. Raises ValueError, with what to do, for a file that does not fit the model."""
    if "expert" not in model.axes:
        raise ValueError(f"{FLAG} deals whole experts: add --ep-size, or leave it out")
    counted = _read(text).get("logical_count")
    if counted is None:
        raise ValueError(
            f"{FLAG}: only logical_count is taken, the tokens of each expert; physical_to_logical_map gives every rank "
            "the same number of experts, which the ranks left after a loss do not have"
        )
    try:
        counts = torch.as_tensor(counted)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{FLAG}: logical_count is no table of numbers ({error})") from None
    counts = counts.sum(dim=0) if counts.dim() == 3 else counts
    if counts.is_floating_point() or counts.is_complex() or (counts < 0).any():
        raise ValueError(f"{FLAG}: logical_count must hold whole numbers from 0 on")
    expected = (model.num_layers, model.axes["expert"])
    if tuple(counts.shape) != expected:
        raise ValueError(
            f"{FLAG}: logical_count has the shape {tuple(counts.shape)}, the model has {expected[0]} layers of "
            f"{expected[1]} experts; record it with this model"
        )
    return tuple(tuple(layer) for layer in counts.tolist())


def _read(text: str) -> dict[str, Any]:
    try:
        if text.endswith(".pt"):
            value = torch.load(text, weights_only=True, map_location="cpu")
        else:
            value = json.loads(Path(text).read_text() if text.endswith(".json") else text)
    except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{FLAG}: {text} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{FLAG}: {text} holds no object with logical_count")
    return value
