"""The text of a training as windows of token ids, on disk.

A SOURCE is tokenised once, in pieces that are held one at a time, into a file of int32 ids, and reading stops when
there are as many tokens as the steps will see; the file is then used through memory mapping, so its size does not
matter. Text that the model itself writes is put down a batch at a time, each with a seed of its own, so that a run that
is killed loses one batch.

The text is cut into windows of ``seqlen`` tokens that do not overlap. ``heldout`` of them, evenly spread, are kept
back: the end of a text is often of another kind than its middle, and their mean is to stand for all of it. The others
are seen in an order that depends on nothing but the seed, epoch by epoch, so that a run that goes on, and each of
several processes, knows the windows of any step.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from signbit.calibration.self_text import write_tokens
from signbit.calibration.text import stream_text
from signbit.calibration.tokens import tokenize
from signbit.errors import SignbitError
from signbit.progress import Progress
from signbit.recipe import Recipe
from signbit.safetensors_file import atomic_file
from signbit.training.options import TrainingOptions

FILE = "tokens.bin"
# Sequences that the model writes together: what fills the machine, and what is lost if it is stopped.
_WRITTEN_TOGETHER = {"cpu": 16, "cuda": 256}
# Seeds of text to learn from, kept apart from those of calibration and evaluation text.
_FIRST_SEED = 7_000_003


def store_text(directory: Path, source: str, tokenizer: Any, config: PreTrainedConfig, recipe: Recipe) -> None:
    """Tokenise SOURCE into the token file of ``directory``, unless it is there; SignbitError if it is too short."""
    file = directory / FILE
    if file.exists():
        return
    needed, seqlen = tokens_needed(recipe), recipe.common.seqlen
    count = 0
    with atomic_file(file) as temporary, temporary.open("wb") as out:
        for number, piece in enumerate(stream_text(source)):
            ids = tokenize(tokenizer, piece, config, special=number == 0)
            out.write(_bytes(ids[: needed - count]))
            count = min(count + len(ids), needed)
            if count == needed:
                break
        heldout = _training(recipe).heldout
        if count // seqlen <= heldout:
            raise SignbitError(
                f"{source} has {count // seqlen} windows of {seqlen} tokens, of which heldout keeps {heldout} back: "
                "give a longer text or a smaller seqlen"
            )


def write_text(directory: Path, writer: PreTrainedModel, recipe: Recipe, progress: Progress) -> None:
    """Let ``writer`` write the token file of ``directory``, or what is missing of it."""
    file, seqlen = directory / FILE, recipe.common.seqlen
    if file.exists():
        return
    options = _training(recipe)
    wanted = max(options.heldout + 1, min(options.self_tokens, tokens_needed(recipe)) // seqlen)
    together = _WRITTEN_TOGETHER[writer.device.type]
    parts = [directory / f"text-{number:05d}.bin" for number in range(-(-wanted // together))]
    with progress.task("batches of text written", len(parts)) as task:
        for number, part in enumerate(parts):
            if not part.exists():
                count = min(together, wanted - number * together)
                seed = _FIRST_SEED * (recipe.common.seed + 1) + number
                written = write_tokens(writer, count, seqlen, seed % 2**63, progress)
                with atomic_file(part) as temporary:
                    temporary.write_bytes(_bytes(written))
            task.advance()
    with atomic_file(file) as temporary, temporary.open("wb") as out:
        for part in parts:
            out.write(part.read_bytes())
    for part in parts:
        part.unlink()


def tokens_needed(recipe: Recipe) -> int:
    """Tokens of a text of which no window is seen twice."""
    options = _training(recipe)
    return (options.steps * options.batch + options.heldout) * recipe.common.seqlen


def _training(recipe: Recipe) -> TrainingOptions:
    assert recipe.training is not None
    return recipe.training


def _bytes(ids: Tensor) -> bytes:
    return ids.to(torch.int32).numpy().astype("<i4", copy=False).tobytes()


class Windows:
    """The windows of a token file, by number; ``heldout`` and ``training`` are numbers."""

    def __init__(self, directory: Path, seqlen: int, heldout: int, seed: int) -> None:
        file = directory / FILE
        self.count, self.seqlen = file.stat().st_size // 4 // seqlen, seqlen
        if self.count <= heldout:  # never written so; empty files cannot even be mapped
            raise SignbitError(f"{file} is damaged: start again with --overwrite")
        tokens = np.memmap(file, dtype="<i4", mode="r")
        self._tokens = tokens[: self.count * seqlen].reshape(self.count, seqlen)
        self._seed = seed
        # The middle of each of as many equal parts.
        self.heldout = [(2 * i + 1) * self.count // (2 * heldout) for i in range(heldout)]
        kept = set(self.heldout)
        self.training = [number for number in range(self.count) if number not in kept]
        self._epoch: tuple[int, list[int]] = (-1, [])

    def ids(self, numbers: list[int]) -> Tensor:
        """int64 [windows, seqlen]."""
        return torch.from_numpy(self._tokens[numbers].astype(np.int64))

    def of_step(self, step: int, batch: int) -> list[int]:
        """The windows of a step, counted from 0."""
        return list(itertools.islice(self._from(step * batch), batch))

    def _from(self, position: int) -> Iterator[int]:
        epoch, place = divmod(position, len(self.training))
        while True:
            yield from self._order(epoch)[place:]
            epoch, place = epoch + 1, 0

    def _order(self, epoch: int) -> list[int]:
        if self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed((self._seed * 1_000_003 + epoch) % 2**63)
            order = torch.randperm(len(self.training), generator=generator).tolist()
            self._epoch = (epoch, [self.training[place] for place in order])
        return self._epoch[1]
