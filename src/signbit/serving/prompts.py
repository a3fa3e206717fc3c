"""Messages and text to the tokens that the model reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from signbit.calibration.tokens import tokenize
from signbit.errors import SignbitError
from signbit.source import first_line

# Characters that a token may stand for, at least, whatever the vocabulary.
_LEAST_LONGEST = 16
_ROLES = {"system": "System", "user": "User", "assistant": "Assistant"}


class PromptTooLongError(SignbitError):
    """It does not fit in the context."""


class Prompts:
    """Prompts of a model, of at most ``context`` tokens together with what is written after them."""

    def __init__(self, tokenizer: Any, config: PreTrainedConfig, context: int) -> None:
        self.context = context
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        self._tokenizer, self._config = tokenizer, config
        longest = max((len(name) for name in tokenizer.get_vocab()), default=0)
        self._most_characters = context * max(longest, _LEAST_LONGEST)
        tokenize(tokenizer, "x", config)  # the first call changes the tokenizer's state; later ones may be in threads

    @property
    def stops(self) -> tuple[str, ...]:
        """What a turn ends with, beside the end tokens."""
        return () if self.has_template else ("\nUser:", "\nSystem:")

    def text(self, text: str) -> list[int]:
        """Of a plain prompt, with the special tokens that the tokenizer adds."""
        tokens = self._tokenize(text, special=True)
        start = self._tokenizer.bos_token_id
        if not tokens and start is not None:
            tokens = [start]
        return self.tokens(tokens)

    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Of a conversation, to be continued by the assistant. SignbitError if the template refuses it."""
        if len(messages) > self.context:  # each is a token at least
            raise PromptTooLongError(f"{len(messages)} messages are too many for a context of {self.context} tokens")
        self._check_characters(sum(len(message["content"]) for message in messages))
        if not self.has_template:
            return self.tokens(self._tokenize(plain_chat(messages), special=True))
        try:
            text = self._tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        except Exception as error:  # templates are programs, and refuse by raising
            raise SignbitError(f"the model's chat template refuses these messages: {first_line(error)}") from error
        return self.tokens(self._tokenize(text, special=False))

    def tokens(self, tokens: list[int]) -> list[int]:
        """Ids that were given as such, checked."""
        size = self._config.get_text_config().vocab_size
        if not tokens:
            raise SignbitError("the prompt is empty: give at least one token")
        if not all(0 <= token < size for token in tokens):
            raise SignbitError(f"token ids must be from 0 to {size - 1}")
        if len(tokens) >= self.context:
            raise PromptTooLongError(
                f"the prompt has {len(tokens)} tokens, the context is {self.context} with at least one to be written: "
                "shorten it"
            )
        return tokens

    def _tokenize(self, text: str, *, special: bool) -> list[int]:
        self._check_characters(len(text))
        tokens: list[int] = tokenize(self._tokenizer, text, self._config, special=special).tolist()
        return tokens

    def _check_characters(self, count: int) -> None:
        """Refuse what is too long in any case before anybody spends seconds on it."""
        if count > self._most_characters:
            raise PromptTooLongError(
                f"the prompt has {count:,} characters, too many for a context of {self.context} tokens: shorten it"
            )


def plain_chat(messages: Sequence[dict[str, str]]) -> str:
    """A conversation for models that bring no template."""
    return "".join(f"{_ROLES[message['role']]}: {message['content']}\n" for message in messages) + "Assistant:"


def context_length(config: PreTrainedConfig, wanted: int | None, usual: int = 4096) -> int:
    """Tokens that a sequence may have: ``wanted``, or the model's limit, up to ``usual``. SignbitError if too many.

    Rotary frequencies that change with the length (``longrope``) would change for all tokens in the middle of a text;
    such models are kept within the range that they were first trained for.
    """
    text = config.get_text_config()
    limits = [getattr(text, "max_position_embeddings", None)]
    for rope in _ropes(text):
        if rope.get("rope_type") in ("longrope", "dynamic"):
            first = "original_max_position_embeddings"
            limits.append(rope.get(first) or getattr(text, first, None))
    limit = min((int(one) for one in limits if one), default=None)
    if wanted is None:
        return usual if limit is None else min(limit, usual)
    if wanted < 2:
        raise SignbitError(f"a context of {wanted} tokens is too short: use at least 2")
    if limit is not None and wanted > limit:
        raise SignbitError(f"a context of {wanted} is beyond the model's {limit} positions: use at most {limit}")
    return wanted


def _ropes(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The rotary parameters of a model, which may differ by layer type."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(found, dict):
        return []
    return [found] if "rope_type" in found else [one for one in found.values() if isinstance(one, dict)]
