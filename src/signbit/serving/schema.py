"""What requests may say: OpenAI's parameters, as far as they mean something here.

Types are strict ("1" is no number) and ranges are OpenAI's. A parameter that would change the answer and is not known
here is refused, not passed over; those that change nothing (``user``, ``metadata``, ...) are accepted; ``null`` is the
same as nothing.

A body of some megabytes may hold a million wrong values, and pydantic makes an error of each, for each member of a
union: minutes and gigabytes. So lists fail at their first wrong item, and objects are counted before all else.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from signbit.serving.errors import ApiError
from signbit.serving.sampling import Sampling

MOST_TOP_LOGPROBS = 20
_MOST_STOPS, _LONGEST_STOP = 16, 1000
_MOST_KEYS, _MOST_BIASES, _MOST_PROMPTS = 100, 1024, 10_000
# Accepted and without effect: they say who asks, or what a host that is not this one should do.
_IDLE = {
    "metadata",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
# Accepted with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "functions": ([],),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}


Item = TypeVar("Item")
List = Annotated[list[Item], Field(fail_fast=True)]
FewList = Annotated[list[Item], Field(fail_fast=True, max_length=_MOST_PROMPTS)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if len(data) > _MOST_KEYS:
            raise ValueError(f"{len(data)} parameters are too many: give at most {_MOST_KEYS}")
        return {key: value for key, value in data.items() if value is not None}


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False  # the padding that hides lengths of pieces; there is none


class _Request(_Strict):
    """What both kinds of completion have."""

    model: str
    n: Annotated[int, Field(ge=1, le=128)] = 1
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = {}
    stop: str | List[str] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @model_validator(mode="before")
    @classmethod
    def _drop_idle(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        for key, value in data.items():
            if key in _NEUTRAL and value is not None and value not in _NEUTRAL[key]:
                raise ValueError(f"{key} is not supported by this server: leave it out")
            if key not in _IDLE and key not in _NEUTRAL:
                kept[key] = value
        return kept

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: str | list[str]) -> str | list[str]:
        stops = [stop] if isinstance(stop, str) else stop
        if len(stops) > _MOST_STOPS or not all(1 <= len(one) <= _LONGEST_STOP for one in stops):
            raise ValueError(f"give at most {_MOST_STOPS} stop strings of 1 to {_LONGEST_STOP} characters")
        return stops

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _check_bias(cls, bias: Any) -> Any:
        if isinstance(bias, dict) and not (len(bias) <= _MOST_BIASES and all(map(_is_id, bias))):
            raise ValueError(f"give token ids, at most {_MOST_BIASES}, and what to add to their logits")
        return bias

    def sampling(self, vocabulary: int) -> Sampling:
        bias = {int(key): value for key, value in self.logit_bias.items()}
        if any(token >= vocabulary for token in bias):
            raise ApiError(400, f"logit_bias: token ids must be less than {vocabulary}", param="logit_bias")
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            logit_bias=bias,
        )


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: str | FewList[str] | List[int] | FewList[List[int]]
    max_tokens: Annotated[int, Field(ge=0)] = 16
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _check(self) -> CompletionRequest:
        if self.best_of not in (None, self.n):
            raise ValueError("best_of is not supported by this server: leave it out, or make it n")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0 and nothing is to be echoed: ask for at least one token")
        return self


class Part(_Strict):
    """A part of a message. Only text can be read here."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | List[Part]
    name: str | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_Request):
    """POST /v1/chat/completions. Without a limit the answer may fill the context."""

    messages: Annotated[List[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def limit(self) -> int | None:
        given = [one for one in (self.max_tokens, self.max_completion_tokens) if one is not None]
        return min(given, default=None)


def _is_id(key: str) -> bool:
    return key.isascii() and key.isdigit() and len(key) < 10


AnyRequest = TypeVar("AnyRequest", bound=_Request)


def parse(kind: type[AnyRequest], body: bytes) -> AnyRequest:
    """The request that a body holds; ApiError that names the parameter at fault."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _explained(error) from None


def _explained(error: ValidationError) -> ApiError:
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['msg'].removeprefix('Invalid JSON: ')}")
    # Only names from the schema: what else is in there, a union's types among it, is pydantic's.
    where = first["loc"]
    param = str(where[0])[:80] if where else None
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "is not a parameter that this server knows: leave it out"
    elif first["type"] == "missing":
        message = "is missing"
    elif len({one["loc"][:1] for one in errors}) == 1 and param == "prompt":
        message = "must be a string, a list of strings, a list of token ids or a list of such lists"
    path = ".".join(str(part)[:80] for part in where)
    return ApiError(400, f"{path}: {message}" if path else message, param)


def finite(logprob: float) -> float:
    """A logarithm that JSON can hold; OpenAI writes -9999 for what is as good as impossible."""
    return max(logprob, -9999.0)
