"""Windows of text: which are seen, when, and how the file comes to be."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from signbit import Recipe, SignbitError
from signbit.calibration import text as texts
from signbit.progress import Silent
from signbit.training import data
from signbit.training.data import FILE, Windows, store_text, write_text
from tiny import CONFIGS, TEXT, build, tokenizer

CONFIG = CONFIGS["llama"]()


def recipe(**keys: Any) -> Recipe:
    return Recipe({"method": "sign", "steps": 5, "batch": 4, "heldout": 2, "seqlen": 16, **keys})


def stored(directory: Path) -> list[int]:
    found: list[int] = np.fromfile(directory / FILE, dtype="<i4").tolist()
    return found


def numbered(directory: Path, count: int, seqlen: int = 4) -> None:
    np.arange(count * seqlen + 1, dtype="<i4").tofile(directory / FILE)


def test_a_file_is_tokenised_as_for_calibration(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    store_text(tmp_path, str(tmp_path / "a.txt"), tokenizer(), CONFIG, recipe(steps=10_000))
    assert stored(tmp_path) == tokenizer()(TEXT)["input_ids"]


def test_a_large_file_is_read_in_pieces_and_no_further_than_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "PIECE", 200)
    rows = [json.dumps({"text": line}) for line in TEXT.splitlines()]
    (tmp_path / "a.jsonl").write_text("\n".join([*rows, "this is no JSON"]))
    store_text(tmp_path, str(tmp_path / "a.jsonl"), tokenizer(), CONFIG, recipe())
    assert len(stored(tmp_path)) == (5 * 4 + 2) * 16
    assert tokenizer().decode(stored(tmp_path)) == TEXT[: len(tokenizer().decode(stored(tmp_path)))]


def test_too_short(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Two words.")
    with pytest.raises(SignbitError, match="windows of 16 tokens, of which heldout keeps 2 back: give a longer text"):
        store_text(tmp_path, str(tmp_path / "a.txt"), tokenizer(), CONFIG, recipe())
    assert not (tmp_path / FILE).exists()


def test_every_window_once_an_epoch_and_none_that_is_held_out(tmp_path: Path) -> None:
    numbered(tmp_path, 23)
    windows = Windows(tmp_path, 4, heldout=3, seed=1)
    assert windows.count == 23
    assert windows.heldout == [3, 11, 19]
    seen = [number for step in range(10) for number in windows.of_step(step, 6)]
    for epoch in (seen[:20], seen[20:40], seen[40:]):
        assert sorted([*epoch, *windows.heldout]) == list(range(23))
    assert seen[:20] != seen[20:40]
    assert windows.ids([2, 0]).tolist() == [[8, 9, 10, 11], [0, 1, 2, 3]]
    assert windows.ids([2]).dtype == torch.int64


def test_the_order_depends_on_seed_and_step_only(tmp_path: Path) -> None:
    numbered(tmp_path, 23)
    first = Windows(tmp_path, 4, heldout=3, seed=1)
    wanted = {step: first.of_step(step, 6) for step in range(12)}
    again = Windows(tmp_path, 4, heldout=3, seed=1)
    assert {step: again.of_step(step, 6) for step in (11, 3, 7, 0)}.items() <= wanted.items()
    assert Windows(tmp_path, 4, heldout=3, seed=2).of_step(0, 6) != wanted[0]


def test_a_batch_larger_than_the_text(tmp_path: Path) -> None:
    numbered(tmp_path, 3)
    windows = Windows(tmp_path, 4, heldout=0, seed=1)
    assert windows.heldout == []
    assert sorted(windows.of_step(0, 7)[:6]) == [0, 0, 1, 1, 2, 2]


def test_written_text_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after the second of three batches; what was written is not written again."""
    monkeypatch.setitem(data._WRITTEN_TOGETHER, "cpu", 8)
    options = recipe(self_tokens=20 * 16)
    writer = build("llama")
    write_text(tmp_path, writer, options, Silent())
    wanted = stored(tmp_path)
    assert len(wanted) == 20 * 16
    assert os.listdir(tmp_path) == [FILE]
    (tmp_path / FILE).unlink()
    original = data.__dict__["write_tokens"]
    calls = []

    def stopping(*arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(data, "write_tokens", stopping)
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path, writer, options, Silent())
    assert not (tmp_path / FILE).exists()
    write_text(tmp_path, writer, options, Silent())
    assert len(calls) == 4
    assert stored(tmp_path) == wanted
    assert wanted[: 8 * 16] != wanted[8 * 16 : 16 * 16]


def test_no_more_is_written_than_the_steps_need(tmp_path: Path) -> None:
    write_text(tmp_path, build("llama"), recipe(steps=1, batch=2), Silent())
    assert len(stored(tmp_path)) == (2 + 2) * 16


@pytest.mark.parametrize("size", [0, 3 * 4 * 4])
def test_a_token_file_that_was_cut_off(size: int, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(bytes(size))
    with pytest.raises(SignbitError, match=r"tokens\.bin is damaged: start again with --overwrite"):
        Windows(tmp_path, 4, heldout=3, seed=1)
