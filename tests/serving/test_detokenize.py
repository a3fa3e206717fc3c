"""Text comes in pieces that add up, and stops where the whole text would."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from signbit.serving.detokenize import Detokenizer, StopStrings, TokenNames, decode
from tiny import SPECIAL_IDS, VOCAB, tokenizer

ALPHABET = st.text(alphabet="ab\n é€🙂", max_size=40)


@given(st.lists(st.integers(0, VOCAB - 1), max_size=40), st.integers(0, 10))
@settings(max_examples=100, deadline=None)
def test_pieces_are_the_whole_text(ids: list[int], known: int) -> None:
    """Any tokens at all, so with bytes that are no text; after a prompt of whole characters."""
    before = tokenizer()("é" * known)["input_ids"]
    detokenizer = Detokenizer(tokenizer(), before)
    pieces = "".join([detokenizer.push(token) for token in ids] + [detokenizer.finish()])
    assert pieces == decode(tokenizer(), ids)


def test_no_half_characters() -> None:
    text = "naïve 日本 🙂👩‍🚀"
    detokenizer = Detokenizer(tokenizer())
    pieces = [detokenizer.push(token) for token in tokenizer()(text)["input_ids"]]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_special_tokens_have_no_text() -> None:
    detokenizer = Detokenizer(tokenizer())
    assert [detokenizer.push(token) for token in SPECIAL_IDS.values()] == ["", "", ""]


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The definition, slowly: the first prefix that ends with a stop string, without it."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@given(ALPHABET, st.lists(st.text(alphabet="ab\né", min_size=1, max_size=4), max_size=3), st.data())
@settings(max_examples=200, deadline=None)
def test_stop_strings(text: str, stops: list[str], data: st.DataObject) -> None:
    """Wherever the pieces are cut, and nothing that was shown is taken back."""
    filtered = StopStrings(stops)
    shown, rest = "", text
    while rest and not filtered.stopped:
        size = data.draw(st.integers(1, len(rest)))
        shown += filtered.push(rest[:size])
        rest = rest[size:]
    if not filtered.stopped:
        shown += filtered.finish()
    assert (shown, filtered.stopped) == cut(text, stops)


def test_beginnings_of_stops_are_held_back() -> None:
    filtered = StopStrings(["</end>"])
    assert [filtered.push(piece) for piece in ("a<", "/e", "x", "</en")] == ["a", "", "</ex", ""]
    assert (filtered.push("d> more"), filtered.stopped) == ("", True)


@pytest.mark.parametrize("text", ["plain", "naïve", "🙂", "\n\t"])
def test_names_of_tokens(text: str) -> None:
    names = TokenNames(tokenizer())
    ids = tokenizer()(text)["input_ids"]
    assert b"".join(names.bytes(token) for token in ids) == text.encode()
    assert all(names.text(token).startswith("bytes:") or names.text(token) in text for token in ids)
    assert names.bytes(VOCAB + 5) == b""
