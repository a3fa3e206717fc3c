"""Text out of tokens as they come, and where it stops.

Tokens are not characters: one may hold a part of a character, and what a token looks like may depend on the one before
(SentencePiece's leading space). So a few earlier tokens are decoded along with the new ones and their text is cut off
again, and what ends in U+FFFD waits: the next token may complete the character.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\ufffd"
# Bytes that a character still to be completed may already have; some decoders give a U+FFFD for each.
_MOST_INCOMPLETE = 3
_CONTEXT = 6


class Detokenizer:
    """The text of a growing sequence, piece by piece; the pieces together are its whole text.

    before: the tokens of the prompt, which the first piece continues. Special tokens have no text.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(before[-_CONTEXT:])  # from some earlier token on
        self._new = len(self._ids)  # from here on, tokens that were not told completely
        self._told = 0  # characters of theirs that were

    def push(self, token: int) -> str:
        """The text that is certain now and was not before."""
        self._ids.append(token)
        text = self._text()
        certain = len(text)
        while certain and len(text) - certain < _MOST_INCOMPLETE and text[certain - 1] == _INCOMPLETE:
            certain -= 1
        piece = text[self._told : certain]
        self._told = max(self._told, certain)
        if piece and certain == len(text):
            self._ids = self._ids[self._new :]
            self._new, self._told = len(self._ids), 0
        return piece

    def finish(self) -> str:
        """What was held back, if the sequence ends here."""
        piece = self._text()[self._told :]
        self._ids, self._new, self._told = [], 0, 0
        return piece

    def _text(self) -> str:
        """Of the new tokens."""
        return decode(self._tokenizer, self._ids)[len(decode(self._tokenizer, self._ids[: self._new])) :]


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) if ids else ""
    return text


class StopStrings:
    """Ends a text before the first of some strings, wherever the pieces that it comes in are cut.

    What may be the beginning of one is held back. If several are complete, the one that was so first counts.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """The text that may be shown now; ``stopped`` is set when it is the last."""
        if not self._stops:
            return piece
        text = self._held + piece
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        held = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What was held back, if the text ends here."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0


class TokenNames:
    """Single tokens, as log-probabilities are listed by them: their text, and their bytes where it has no text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = json.loads(backend.to_str()).get("decoder") if backend is not None else None
        self._bytes = _byte_characters() if '"ByteLevel"' in json.dumps(decoder) else {}

    def bytes(self, token: int) -> bytes:
        name = self._tokenizer.convert_ids_to_tokens(token)
        if name is None:
            return b""  # models have rows to spare
        if self._bytes and all(character in self._bytes for character in name):
            return bytes(self._bytes[character] for character in name)
        if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", name):
            return bytes([int(match[1], 16)])
        return str(name).replace("\u2581", " ").encode()

    def text(self, token: int) -> str:
        """Bytes that are no text by themselves are written as OpenAI writes them: ``bytes:\\xe2\\x82``."""
        data = self.bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _byte_characters() -> dict[str, int]:
    """GPT-2's way to write bytes as characters: printable ones as they are, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return table | {chr(0x100 + index): byte for index, byte in enumerate(others)}
