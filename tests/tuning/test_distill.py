"""Distillation of scales at the end: the same as a training of them, asked for in a recipe of quantize."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import signbit
from signbit import Recipe, SignbitError, checkpoint

MakeDir = Callable[..., Path]
DISTILL = {"epochs": 1, "batch": 2, "distill": 30, "distill_batch": 2, "distill_lr": 1e-2}


def recipe(text_file: Path, **fields: Any) -> Recipe:
    own = {"method": "xnor", "planes": 2, "samples": 4, "seqlen": 48, "calib": str(text_file), "tune": DISTILL}
    return Recipe({**own, **fields})


def test_scales_are_trained_and_signs_stay(tiny_dir: MakeDir, text_file: Path, tmp_path: Path) -> None:
    model = tiny_dir("llama")
    signbit.quantize(model, tmp_path / "plain", recipe(text_file, tune={**DISTILL, "distill": 0}))
    signbit.quantize(model, tmp_path / "distilled", recipe(text_file))
    plain, distilled = (
        signbit.load(tmp_path / name)[0].get_submodule("model.layers.1.mlp.up_proj").packed
        for name in ("plain", "distilled")
    )
    assert torch.equal(plain.signs, distilled.signs)
    assert not torch.equal(plain.scales, distilled.scales)
    divergence = {
        name: signbit.evaluate(tmp_path / name, perplexity=text_file, seqlen=48, windows=8, against=model)["divergence"]
        for name in ("plain", "distilled")
    }
    kl = {name: found[str(text_file)]["kl"] for name, found in divergence.items()}
    assert kl["distilled"] < kl["plain"]


def test_the_checkpoint_says_how_it_was_made(tiny_dir: MakeDir, text_file: Path, tmp_path: Path) -> None:
    model = tiny_dir("llama")
    signbit.quantize(model, tmp_path / "out", recipe(text_file))
    kept = checkpoint.read_recipe(tmp_path / "out")
    assert (kept["steps"], kept["signs"], kept["tune"]["distill"]) == (30, False, 0)
    signbit.train(model, tmp_path / "again", Recipe(kept))
    ours, again = (tmp_path / name / "model.safetensors" for name in ("out", "again"))
    assert ours.read_bytes() == again.read_bytes()


def test_a_finished_run_is_not_made_again(tiny_dir: MakeDir, text_file: Path, tmp_path: Path) -> None:
    model = tiny_dir("llama")
    signbit.quantize(model, tmp_path / "out", recipe(text_file))
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    signbit.quantize(model, tmp_path / "out", recipe(text_file), resume=True)
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 5}, "a training of its own"),
        ({"tune": {**DISTILL, "distill": -1}}, "tune.distill"),
    ],
)
def test_what_does_not_go_together_is_refused(fields: dict[str, Any], message: str, text_file: Path) -> None:
    with pytest.raises(SignbitError, match=message):
        recipe(text_file, **fields)


def test_without_signs_only_learned_scales_are_left_to_train() -> None:
    with pytest.raises(SignbitError, match="set learned"):
        Recipe({"method": "sign", "steps": 5, "signs": False, "scales": "fixed"})
