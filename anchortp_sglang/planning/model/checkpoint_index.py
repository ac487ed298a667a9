"""Does a checkpoint hold what the planner thinks it holds? Read from its model.safetensors.index.json."""

import re
from collections.abc import Mapping
from math import prod
from typing import Any

from anchortp_sglang.planning.model.axes import UnsupportedModel
from anchortp_sglang.planning.model.plan_model import PlanModel

_UNUSED = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|\.(k|v)_scale$")
_TOLERANCE = 0.01
"""Scales and router biases are stored in two bytes by some, in four by others."""


def check_index(model: PlanModel, index: Mapping[str, Any], same_dtype: bool) -> None:
    """Raise UnsupportedModel, naming the tensors, unless the index lists every tensor of the model and nothing
    that the planner does not know; and, where nothing was left out and the model is planned in the dtype of the
    checkpoint (``same_dtype``), as many bytes as they make."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, Mapping):
        raise UnsupportedModel("weight_map: the index of the checkpoint must map tensors to files")
    needed = {name: (prod(shape), nbytes) for name, shape, nbytes in model.tensors()}
    if missing := sorted(needed.keys() - weight_map.keys()):
        raise UnsupportedModel(f"weight_map: the checkpoint has no {_some(missing)}, which {model.architecture} needs")
    left_out = tuple(f"{prefix}." for prefix in model.left_out)
    others = {name for name in weight_map.keys() - needed.keys() if not _UNUSED.search(name)}
    others.discard("lm_head.weight")  # a tied head that was stored all the same
    if strangers := sorted(name for name in others if not name.startswith(left_out)):
        raise UnsupportedModel(f"weight_map: no rule for {_some(strangers)} in {model.architecture}")
    stored = (index.get("metadata") or {}).get("total_size")
    if same_dtype and stored is not None and weight_map.keys() == needed.keys():
        _check_bytes(needed, stored)


def _check_bytes(needed: Mapping[str, tuple[int, int]], stored: Any) -> None:
    planned = sum(elements * nbytes for elements, nbytes in needed.values())
    if not isinstance(stored, int) or abs(stored - planned) > planned * _TOLERANCE:
        raise UnsupportedModel(
            f"metadata.total_size: the checkpoint has {stored} bytes; config.json makes {planned} of the same tensors"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
