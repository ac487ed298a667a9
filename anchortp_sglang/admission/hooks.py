"""Hooks in main that refuse requests that cannot be resumed or would end a rank, before a rank sees them.

SGLang answers a ValueError with 400 on /generate and the APIs on top of it; Engine raises it.
"""

import copy
import json
from array import array
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import msgspec

from anchortp_sglang.admission import limits
from anchortp_sglang.admission.checks import check_custom_labels, check_generate_request
from anchortp_sglang.admission.limits import Limits

asking: ContextVar[Any] = ContextVar("asking", default=None)
"""The GenerateReqInput that this task asks TokenizerManager for."""


class NotAdmitted(ValueError):
    """The request is refused; no rank sees it."""


def before_generate_request(tokenizer_manager: Any, obj: Any, request: Any = None) -> None:
    """BEFORE TokenizerManager.generate_request: check each request as it was received."""
    asking.set(obj)
    reason = _check_rids(obj) or check_generate_request(obj)
    reason = reason or limits.judge_as_received(obj.sampling_params, _is_batch(obj), _prompts(obj))
    if reason is None and tokenizer_manager.enable_metrics:
        reason = check_custom_labels(getattr(obj, "custom_labels", None), tokenizer_manager.metrics_collector.labels)
    if reason is not None:
        raise NotAdmitted(reason)


def around_create_tokenized_object(
    original: Callable[..., Any], tokenizer_manager: Any, obj: Any, *args: Any, **kwargs: Any
) -> Any:
    """AROUND TokenizerManager._create_tokenized_object: check each request of a batch once it is tokenized."""
    if isinstance(obj.sampling_params, Mapping) and obj.sampling_params.get("is_normalized"):
        raise NotAdmitted("is_normalized is set by the server; send the request without it")
    try:
        request = original(tokenizer_manager, obj, *args, **kwargs)
    except (TypeError, AttributeError, OverflowError) as error:
        raise NotAdmitted(_why_unreadable(obj.sampling_params) or f"sampling_params: {error}") from error
    bounds = _limits(tokenizer_manager)
    reason = _misread(request) or limits.judge(request, bounds)
    if reason is not None:
        raise NotAdmitted(reason)
    return limits.without_what_has_no_effect(request, bounds)


async def around_serve_generate_request(original: Callable[..., Any], obj: Any, request: Any) -> Any:
    """AROUND http_server.serve_generate_request: wait for a stream's first chunk, so that a refusal is a 400.

    SGLang itself does so for the streams of OpenAI's API (``_handle_streaming_request``).
    """
    response = await original(obj, request)
    if not obj.stream:
        return response
    chunks = response.body_iterator
    first = await anext(chunks, None)
    refusal = _refusal_in(first)
    if refusal is not None:
        from fastapi.responses import ORJSONResponse

        return ORJSONResponse({"error": refusal}, status_code=refusal["code"])
    response.body_iterator = joined(first, chunks)
    return response


def answer_not_admitted(request: Any, error: Exception) -> Any:
    """Return the 400 of a NotAdmitted, for SGLang's routes that do not handle a ValueError."""
    from fastapi.responses import ORJSONResponse

    return ORJSONResponse({"error": {"message": str(error)}}, status_code=400)


async def joined(first: Any, rest: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """Yield ``first``, unless it is None, and then what ``rest`` yields."""
    if first is not None:
        yield first
    async for chunk in rest:
        yield chunk


def _check_rids(obj: Any) -> str | None:
    """Refuse rids of health checks: a busy scheduler drops such requests, and TokenizerManager does not end them."""
    from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX

    rids = obj.rid if isinstance(obj.rid, list) else [obj.rid]
    if obj.log_metrics is not False and any(str(rid).startswith(HEALTH_CHECK_RID_PREFIX) for rid in rids):
        return (
            f"rid begins with {HEALTH_CHECK_RID_PREFIX}, which is reserved for the server's health checks; use another"
        )
    return None


def _prompts(obj: Any) -> int:
    given = obj.text if obj.text is not None else obj.input_ids
    return len(given) if _is_batch(obj) else 1


def _is_batch(obj: Any) -> bool:
    """Return what ``GenerateReqInput._determine_batch_size`` will find."""
    return isinstance(obj.text, list) or (
        isinstance(obj.input_ids, list) and any(isinstance(one, list) for one in obj.input_ids[:1])
    )


def _refusal_in(chunk: bytes | None) -> dict[str, Any] | None:
    if chunk is None or not chunk.startswith(b'data: {"error"'):
        return None
    refusal: dict[str, Any] = json.loads(chunk.removeprefix(b"data: "))["error"]
    return refusal


def _limits(tokenizer_manager: Any) -> Limits:
    """Return the bounds, with the end tokens that BatchedMinNewTokensPenalizer._prepare suppresses."""
    from sglang.srt.runtime_context import get_exec

    model, tokenizer = tokenizer_manager.model_config, tokenizer_manager.tokenizer
    ends = {*(model.hf_eos_token_id or ()), *(getattr(tokenizer, "additional_stop_token_ids", None) or ())}
    ends.add(getattr(tokenizer, "eos_token_id", None))
    seeded = get_exec().deterministic.enable_deterministic_inference
    return Limits(model.vocab_size, frozenset(ends - {None}), seeded)


def _misread(request: Any) -> str | None:
    """Return why rank 0 could not decode the request, or None. The typed decoder's error would end the rank."""
    from sglang.srt.managers.io_struct import msgpack_decode, msgpack_encode

    probe = copy.copy(request)
    probe.input_ids, probe.time_stats = array("q"), None  # always well formed, and nearly all of the bytes
    try:
        msgpack_decode(msgpack_encode(probe))
    except (msgspec.MsgspecError, TypeError, ValueError, OverflowError) as error:
        fields = {name: getattr(probe, name) for name in probe.__struct_fields__}
        sampling = {name: getattr(probe.sampling_params, name) for name in probe.sampling_params.__struct_fields__}
        return _why_unreadable(sampling) or next(_unreadable(type(probe), fields), str(error))
    return None


def _why_unreadable(sampling_params: Mapping[str, Any]) -> str | None:
    from sglang.srt.sampling.sampling_params import SamplingParams

    return next(_unreadable(SamplingParams, sampling_params), None)


def _unreadable(struct: type, values: Mapping[str, Any]) -> Iterator[str]:
    """Yield a reason for each value that does not have the type of its field in ``struct``."""
    from sglang.srt.managers.io_struct import dec_hook, enc_hook, ext_hook

    fields = {field.encode_name: field for field in msgspec.structs.fields(struct)}
    for name, value in values.items():
        if name not in fields:
            yield f"{name} is not a sampling parameter"
            continue
        try:
            encoded = msgspec.msgpack.encode(value, enc_hook=enc_hook)
            msgspec.msgpack.decode(encoded, type=fields[name].type, dec_hook=dec_hook, ext_hook=ext_hook)
        except (msgspec.MsgspecError, TypeError, ValueError, OverflowError) as error:
            if value is not None:  # SamplingParams takes None for the default
                yield f"{name} is {limits.shown(value)}: {error}"
