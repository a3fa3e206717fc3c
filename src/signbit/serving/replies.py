"""What answers look like: whole ones and the chunks of streams, of both kinds of completion."""

from __future__ import annotations

import codecs
import time
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from signbit.serving.detokenize import TokenNames
from signbit.serving.job import Entry, Job
from signbit.serving.schema import finite
from signbit.version import __version__


class Reply(Protocol):
    """How one request is answered. Texts come in pieces; a whole answer is one piece for each choice."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """The chunk of a stream before a choice's first, if there is one."""
        ...

    def chunk(self, index: int, text: str, entries: Sequence[Entry], finish: str | None) -> dict[str, Any]: ...

    def whole(self, index: int, text: str, entries: Sequence[Entry], finish: str | None) -> dict[str, Any]:
        """One of the choices of an answer that is not streamed."""
        ...

    def envelope(self, choices: list[dict[str, Any]], *, streamed: bool) -> dict[str, Any]: ...


class _Envelope:
    def __init__(self, model: str, prefix: str) -> None:
        self._common = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"signbit-{__version__}",
        }

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._common, "object": kind, "choices": choices}


class ChatReply(_Envelope):
    def __init__(self, model: str, names: TokenNames, logprobs: bool) -> None:
        super().__init__(model, "chatcmpl")
        self._names, self._logprobs = names, logprobs

    def opening(self, index: int) -> dict[str, Any]:
        return {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }

    def chunk(self, index: int, text: str, entries: Sequence[Entry], finish: str | None) -> dict[str, Any]:
        delta = {"content": text} if text or entries else {}
        return {"index": index, "delta": delta, "logprobs": self._content(entries), "finish_reason": finish}

    def whole(self, index: int, text: str, entries: Sequence[Entry], finish: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._content(entries), "finish_reason": finish}

    def envelope(self, choices: list[dict[str, Any]], *, streamed: bool) -> dict[str, Any]:
        return self._envelope("chat.completion.chunk" if streamed else "chat.completion", choices)

    def _content(self, entries: Sequence[Entry]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        content = []
        for entry in entries:
            top = [self._token(token, logprob) for token, logprob in entry.top]
            content.append({**self._token(entry.token, entry.logprob or 0.0), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        data = self._names.bytes(token)
        return {"token": self._names.text(token), "logprob": finite(logprob), "bytes": list(data)}


class CompletionReply(_Envelope):
    def __init__(self, model: str, names: TokenNames, logprobs: bool) -> None:
        super().__init__(model, "cmpl")
        self._names, self._logprobs = names, logprobs
        self._offsets: dict[int, _Offset] = {}

    def opening(self, index: int) -> None:
        return None

    def chunk(self, index: int, text: str, entries: Sequence[Entry], finish: str | None) -> dict[str, Any]:
        logprobs = self._listed(index, entries) if self._logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    whole = chunk

    def envelope(self, choices: list[dict[str, Any]], *, streamed: bool) -> dict[str, Any]:
        return self._envelope("text_completion", choices)

    def _listed(self, index: int, entries: Sequence[Entry]) -> dict[str, Any]:
        offset = self._offsets.setdefault(index, _Offset())
        names = self._names
        return {
            "tokens": [names.text(entry.token) for entry in entries],
            "token_logprobs": [None if entry.logprob is None else finite(entry.logprob) for entry in entries],
            "top_logprobs": [
                None if entry.logprob is None else {names.text(token): finite(logprob) for token, logprob in entry.top}
                for entry in entries
            ],
            "text_offset": [offset.before(names.bytes(entry.token)) for entry in entries],
        }


class _Offset:
    """Characters before each token of a choice."""

    def __init__(self) -> None:
        self._characters = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def before(self, token: bytes) -> int:
        start = self._characters
        self._characters += len(self._decoder.decode(token))
        return start


def usage(jobs: Sequence[Job]) -> dict[str, Any]:
    read, written = sum(len(job.prompt) for job in jobs), sum(job.written for job in jobs)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
