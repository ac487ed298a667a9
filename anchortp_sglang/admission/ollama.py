"""Streams of Ollama's API (/api/chat, /api/generate), which lose no text and say why they end.

SGLang's put no text into a stream's last message (entrypoints/ollama/serving.py). A message has all tokens since the
one before, so whenever main was busy, as in a recovery, several of them are lost. An error ends its streams without a
word, and a refusal comes after the 200.
"""

from collections.abc import AsyncIterator, Callable
from typing import Any

from anchortp_sglang.admission.hooks import answer_not_admitted, joined


async def stream_chat(serving: Any, request: Any, raw_request: Any, model: str) -> Any:
    """REPLACE OllamaServing._stream_chat_response."""
    from sglang.srt.entrypoints.ollama.protocol import OllamaChatStreamResponse, OllamaMessage

    def message(text: str, **end: Any) -> Any:
        said = OllamaMessage(role="assistant", content=text)
        return OllamaChatStreamResponse(model=model, created_at=serving._get_timestamp(), message=said, **end)

    return await _stream(serving.tokenizer_manager, request, raw_request, message)


async def stream_generate(serving: Any, request: Any, raw_request: Any, model: str) -> Any:
    """REPLACE OllamaServing._stream_generate_response."""
    from sglang.srt.entrypoints.ollama.protocol import OllamaGenerateStreamResponse

    def message(text: str, **end: Any) -> Any:
        return OllamaGenerateStreamResponse(model=model, created_at=serving._get_timestamp(), response=text, **end)

    return await _stream(serving.tokenizer_manager, request, raw_request, message)


async def _stream(tokenizer_manager: Any, request: Any, raw_request: Any, message: Callable[..., Any]) -> Any:
    """Answer with the messages, once there is a first one: a refusal before it is raised, and gets its own status."""
    from fastapi import HTTPException
    from fastapi.responses import StreamingResponse

    outputs = tokenizer_manager.generate_request(request, raw_request)
    first = await anext(outputs)
    if (error := _error_in(first)) is not None and error.get("status_code"):
        raise HTTPException(int(error["status_code"]), error["message"])
    lines = _lines(joined(first, outputs), message)
    return StreamingResponse(lines, media_type="application/x-ndjson")


async def _lines(outputs: AsyncIterator[Any], message: Callable[..., Any]) -> AsyncIterator[bytes]:
    import orjson

    sent = 0
    async for output in outputs:
        if (error := _error_in(output)) is not None:
            yield orjson.dumps({"error": error.get("message", "the request was aborted")}) + b"\n"
            return
        text = output.get("text", "")
        yield orjson.dumps(message(text[sent:], done=False).model_dump()) + b"\n"
        sent = len(text)
        if output["meta_info"].get("finish_reason") is not None:
            yield orjson.dumps(message("", done=True, done_reason="stop").model_dump()) + b"\n"


def _error_in(output: dict[str, Any]) -> dict[str, Any] | None:
    reason: dict[str, Any] | None = output["meta_info"].get("finish_reason")
    return reason if reason is not None and reason["type"] == "abort" else None


def answer_value_error(request: Any, error: Exception) -> Any:
    """Return a 400 on the routes of Ollama's API, which handle no ValueError. Raises ``error`` on all others."""
    if not request.url.path.startswith("/api/"):
        raise error
    return answer_not_admitted(request, error)
