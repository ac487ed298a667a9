"""Early refusals: features of a server or a request that a recovery could not restore.

Imports no SGLang. Records are read by attribute or key, so the checks run before the slow import, on raw and on
resolved records, and in tests on plain objects.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from anchortp_sglang.admission.devices import DeviceRules
from anchortp_sglang.admission.flags import ENVIRONMENT, FLAG_OF_FIELD, FLAG_RULES, FlagRule
from anchortp_sglang.admission.requests import REQUEST_FIELDS, ROUTES, SAMPLING_KEYS, SERVED_MESSAGES

# SGLang spells "off" differently from flag to flag.
_OFF_WORDS = ("", "{}", "null", "none", "off")
_FALSE_WORDS = ("", "0", "false", "no", "n")


@dataclass(frozen=True)
class Refusal:
    """A flag or environment variable with which the server does not start."""

    flag: str
    value: Any
    why: str
    way_out: str

    def __str__(self) -> str:
        given = self.flag if self.value is True else f"{self.flag} {self.value}"
        return f"{given}: {self.why}; {self.way_out}"


class UnsupportedError(ValueError):
    """The server's arguments ask for unsupported features; ``refusals`` lists all of them."""

    def __init__(self, refusals: Iterable[Refusal]) -> None:
        self.refusals = tuple(refusals)
        lines = "".join(f"\n  {refusal}" for refusal in self.refusals)
        super().__init__(f"not supported by anchortp-sglang (stock SGLang is):{lines}")


def check_server_args(view: Any, rules: DeviceRules, environ: Mapping[str, str] = os.environ) -> list[Refusal]:
    """Return the refusals of ``view``, in the order of the tables; none if the server may start.

    ``view`` is a ServerArgs, its resolving view, or a mapping with the same names. Check the raw record for a fast
    answer, and the resolved one for what SGLang derives from the checkpoint. ``rules``: those of the server's platform.
    """
    refusals = [
        _refusal(name, value, rule.why, rule.way_out)
        for rule in FLAG_RULES
        for name in rule.fields.split()
        if not _may_be(value := _get(view, name), rule)
    ]
    refusals += _check_device(view, rules) + _check_lora(view, rules) + _check_kv_cache_dtype(view, rules)
    refusals += [
        Refusal(variable, environ[variable], why, f"unset {variable}")
        for variable, why in ENVIRONMENT.items()
        if environ.get(variable, "").lower() not in _FALSE_WORDS
    ]
    return refusals


def check_generate_request(obj: Any) -> str | None:
    """Return why the request is refused, or None. ``obj`` is a GenerateReqInput, batched or not."""
    for name, what in REQUEST_FIELDS.items():
        if is_present(getattr(obj, name, None)):
            return _cannot_resume(what, name)
    return (
        _check_hidden_states(getattr(obj, "return_hidden_states", None))
        or _check_processors(getattr(obj, "custom_logit_processor", None))
        or _check_sampling_params(getattr(obj, "sampling_params", None))
    )


def check_custom_labels(labels: Mapping[str, str] | None, known: Iterable[str]) -> str | None:
    """Return why metrics cannot have the labels, or None. prometheus_client would raise in TokenizerManager's loop."""
    unknown = sorted(set(labels or ()) - set(known))
    if not unknown:
        return None
    return f"custom_labels has {', '.join(unknown)}; allow it with --tokenizer-metrics-allowed-custom-labels"


def check_route(path: str, root_path: str = "") -> str | None:
    """Return why SGLang's route ``path``, which may begin with the server's ``root_path``, is refused, or None."""
    route = path.removeprefix(root_path).rstrip("/")
    why = ROUTES.get("/dumper/{method}" if route.startswith("/dumper/") else route)
    return None if why is None else f"{path} is refused by anchortp-sglang: {why}."


def check_message(kind: str) -> str | None:
    """Return why TokenizerManager may not send a message of class ``kind`` to the ranks, or None."""
    if kind in SERVED_MESSAGES:
        return None
    return f"{kind} is refused by anchortp-sglang: its effect on the ranks would be lost in a recovery."


def is_off(value: Any) -> bool:
    """Return whether the value of a ServerArgs field switches its feature off."""
    if value is None or value is False:
        return True
    if isinstance(value, str):
        return value.lower() in _OFF_WORDS
    return value == 0 if isinstance(value, (int, float)) else not is_present(value)


def is_present(value: Any) -> bool:
    """Return whether a request field asks for something; a list does if one of its items does.

    Stops at the first such item, and never evaluates arrays or images.
    """
    if value is None or value is False:
        return False
    if isinstance(value, (list, tuple)):
        return any(is_present(item) for item in value)
    return len(value) > 0 if isinstance(value, (str, bytes, dict)) else True


def _may_be(value: Any, rule: FlagRule) -> bool:
    # As True == 1, a switch would otherwise pass for the size 1.
    return is_off(value) or (value is not True and value in rule.allowed)


def _get(view: Any, name: str) -> Any:
    return view.get(name) if isinstance(view, Mapping) else getattr(view, name, None)


def _refusal(name: str, value: Any, why: str, way_out: str) -> Refusal:
    return Refusal(FLAG_OF_FIELD.get(name, "--" + name.replace("_", "-")), value, why, way_out)


_NO_SUCH_DEVICE = "anchors hold no memory of such devices"


def _check_device(view: Any, rules: DeviceRules) -> list[Refusal]:
    device = _get(view, "device")
    if device is None:  # SGLang chooses it; the resolved record is checked again
        return []
    if device != rules.device:
        return [_refusal("device", device, _NO_SUCH_DEVICE, f"use --device {rules.device}")]
    known = rules.attention_backends
    names = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
    return [
        _refusal(name, value, f"no kernels for ranks on --device {device}", f"use {' or '.join(known)}")
        for name in names
        if (value := _get(view, name)) not in (None, *known)
    ]


def _check_lora(view: Any, rules: DeviceRules) -> list[Refusal]:
    asked = [name for name in ("enable_lora", "lora_paths") if not is_off(_get(view, name))]
    backend, known = _get(view, "lora_backend"), rules.lora_backends
    if not asked or _get(view, "device") not in (None, rules.device) or (known and backend in (None, *known)):
        return []
    if not known:
        why = f"no adapter has been served on --device {rules.device} yet"
        return [_refusal(asked[0], _get(view, asked[0]), why, "merge the adapter into the checkpoint")]
    why = f"no kernels for ranks on --device {rules.device}"
    return [_refusal("lora_backend", backend, why, f"use {' or '.join(known)}")]


KV_DTYPE_BYTES = {"bf16": 2, "bfloat16": 2, "fp8_e5m2": 1, "fp8_e4m3": 1}
"""Bytes of a stored element for each ``--kv-cache-dtype`` except "auto", which is the model's dtype."""


def _check_kv_cache_dtype(view: Any, rules: DeviceRules) -> list[Refusal]:
    kv_dtype = _get(view, "kv_cache_dtype") or "auto"
    if kv_dtype.startswith("fp8") and rules.why_no_fp8_kv and _get(view, "device") == rules.device:
        return [_refusal("kv_cache_dtype", kv_dtype, rules.why_no_fp8_kv, "use auto or bf16")]
    if kv_dtype == "auto" or kv_dtype in KV_DTYPE_BYTES:
        return []
    why = "KV buffers of packed elements or with scales of their own are not kept in the anchors"
    return [_refusal("kv_cache_dtype", kv_dtype, why, f"use one of auto, {', '.join(KV_DTYPE_BYTES)}")]


def _check_hidden_states(modes: Any) -> str | None:
    """Refuse those of all tokens: ranks send them anew with each token, and new ranks do not have the first ones."""
    if not any(mode is True for mode in (modes if isinstance(modes, (list, tuple)) else (modes,))):
        return None
    return (
        'return_hidden_states of all tokens cannot be resumed after a fault yet; ask for those of the last one ("last")'
    )


def _check_processors(serialized: Any) -> str | None:
    """Refuse strings that ranks would fail to read (``CustomLogitProcessor.from_str``), without running their code."""
    for one in serialized if isinstance(serialized, (list, tuple)) else (serialized,):
        if one is None or one == "":
            continue
        try:
            bytes.fromhex(json.loads(one)["callable"])
        except (ValueError, TypeError, KeyError):
            return "custom_logit_processor must be a string as CustomLogitProcessor.to_str() makes it"
    return None


def _check_sampling_params(params: Any) -> str | None:
    for one in params if isinstance(params, (list, tuple)) else (params,):
        if not isinstance(one, Mapping):
            continue
        for key, what in SAMPLING_KEYS.items():
            if is_present(one.get(key)):
                return _cannot_resume(what, key)
        if (one.get("beam_width") or 1) > 1:
            return _cannot_resume("beam search", "beam_width")
    return None


def _cannot_resume(what: str, name: str) -> str:
    return f"{what[0].upper()}{what[1:]} cannot be resumed after a fault yet; send the request without {name}."
