"""Requests of a great many wrong values make few errors: the first of a list, and the count of keys."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from signbit.serving import schema
from signbit.serving.errors import ApiError
from signbit.serving.schema import ChatRequest, CompletionRequest

MANY = 50_000
MESSAGE = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (CompletionRequest, {"prompt": [None] * MANY}),
        (CompletionRequest, {"prompt": [[1], *[[None] * 9] * MANY]}),
        (CompletionRequest, {"prompt": "a", "stop": [3] * MANY}),
        (CompletionRequest, {"prompt": "a", "logit_bias": {f"x{i}": "y" for i in range(MANY)}}),
        (CompletionRequest, {"prompt": "a", **{f"key{i}": i for i in range(MANY)}}),
        (ChatRequest, {"messages": [7] * MANY}),
        (ChatRequest, {"messages": [{**MESSAGE, "content": [7] * MANY}]}),
        (ChatRequest, {"messages": [{**MESSAGE, **{f"key{i}": i for i in range(MANY)}}]}),
    ],
)
def test_errors_are_few(kind: Any, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    explain = schema._explained

    def explained(error: ValidationError) -> ApiError:
        counted.append(error.error_count())
        return explain(error)

    monkeypatch.setattr(schema, "_explained", explained)
    with pytest.raises(ApiError):
        schema.parse(kind, json.dumps({"model": "m", **fields}).encode())
    assert counted and counted[0] <= 10


def test_requests_within_the_limits_pass() -> None:
    found = schema.parse(
        CompletionRequest, b'{"model": "m", "prompt": [[1, 2], [3]], "stop": ["a", "b"], "logit_bias": {"5": 1.5}}'
    )
    assert found.prompt == [[1, 2], [3]] and found.logit_bias == {"5": 1.5}
