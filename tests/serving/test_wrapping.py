"""Lines of a terminal end between words, however the text is cut into pieces."""

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from signbit.serving.wrapping import Wrapping, line_width


def shown(pieces: list[str], width: int) -> list[str]:
    """The lines on the screen of a terminal that is wide enough."""
    out = io.StringIO()
    wrapping = Wrapping(out, width)
    for piece in pieces:
        wrapping.write(piece)
    text = out.getvalue()
    while back := re.search(r"\x1b\[(\d+)D\x1b\[K", text):
        text = text[: back.start() - int(back[1])] + text[back.end() :]
    return text.split("\n")


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("to be or not", ["to be ", "or not"]),
        ("to be  or", ["to be  ", "or"]),
        ("one thousands", ["one ", "thousan", "ds"]),
        ("a\n\nb", ["a", "", "b"]),
        ("abcdefg hi", ["abcdefg", "hi"]),
        ("ab 漢字漢字", ["ab 漢字", "漢字"]),
        ("e\u0301" * 7, ["e\u0301" * 7]),
    ],
)
def test_lines(text: str, lines: list[str]) -> None:
    assert shown([text], 7) == lines
    assert shown(list(text), 7) == lines


@given(st.lists(st.text("ab 漢\n", max_size=9), max_size=9), st.integers(2, 12))
def test_nothing_is_lost_and_nothing_too_wide(pieces: list[str], width: int) -> None:
    lines = shown(pieces, width)
    assert all(cell_len(line) <= width for line in lines)
    assert "".join(lines).replace(" ", "") == re.sub(r"\s", "", "".join(pieces))


def test_pipes_have_no_width() -> None:
    assert line_width(io.StringIO()) is None
