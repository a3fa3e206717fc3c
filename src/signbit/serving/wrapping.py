"""Text for a terminal, broken between words although it comes in pieces of them.

Each character is shown at once. A word that turns out not to fit in its line is taken back and written in the next.
"""

from __future__ import annotations

import os
from typing import TextIO

from rich.cells import cell_len


class Wrapping:
    """Writes to ``out`` in lines of at most ``width`` cells. Words are what spaces end, and single wide characters."""

    def __init__(self, out: TextIO, width: int) -> None:
        self._out, self._width = out, width
        self._column = 0
        self._word = ""  # what stands of it before the cursor

    def write(self, text: str) -> None:
        for character in text.replace("\t", "    "):
            self._write(character)
        self._out.flush()

    def _write(self, character: str) -> None:
        cells = cell_len(character)
        if character == "\n" or (character == " " and self._column == self._width):
            self._out.write("\n")
            self._column, self._word = 0, ""
            return
        if character == " " or cells > 1:
            self._word = ""
        if self._column + cells > self._width:
            self._break()
        self._out.write(character)
        self._column += cells
        if character != " " and cells < 2:
            self._word += character

    def _break(self) -> None:
        """Begin a line, with the word that was begun unless it fills a line by itself."""
        begun = cell_len(self._word)
        if begun == self._column:
            self._word, begun = "", 0
        back = f"\x1b[{begun}D\x1b[K" if begun else ""
        self._out.write(f"{back}\n{self._word}")
        self._column = begun


def line_width(out: TextIO) -> int | None:
    """Cells that a line of a terminal may have; None for anything else. The last is left free: cursors differ there."""
    if not out.isatty() or os.environ.get("TERM") == "dumb":
        return None
    return max(os.get_terminal_size(out.fileno()).columns - 1, 8)
