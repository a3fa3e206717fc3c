"""Block reconstruction: it lowers the block's error, for every layout, and what it keeps is what is stored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import signbit
from signbit import Recipe, SignbitError
from signbit.report.quantization import QuantizationReport
from signbit.tuning.block import relative_error

MakeDir = Callable[..., Path]
TUNE: dict[str, Any] = {"samples": 8, "seqlen": 48, "tune": {"epochs": 8, "batch": 2, "lr": 1e-3}}
METHODS: dict[str, dict[str, Any]] = {
    "xnor": {"method": "xnor", "planes": 2},
    "billm": {"method": "billm", "group_size": 32},
    "arb-llm": {"method": "arb-llm", "group_size": 32},
    "hbllm": {"method": "hbllm", "group_size": 32},
    "stbllm": {"method": "stbllm", "group_size": 32},
    "pb-llm": {"method": "pb-llm", "group_size": 32},
    "gptq": {"method": "gptq", "bits": 2, "group_size": 32},
    # A factor's sign is in a whole row or column of W, which in tiny matrices is too much to turn at once.
    "sign-factors": {
        "method": "sign-factors",
        "bits": 4,
        "iterations": 20,
        "tune": {**TUNE["tune"], "signs": False, "scale_lr": 1e-2},
    },
}


def recipe(text_file: Path, method: str = "xnor", **fields: Any) -> Recipe:
    return Recipe({**TUNE, **METHODS[method], "calib": str(text_file), **fields})


def report(out: Path) -> QuantizationReport:
    found = QuantizationReport.read(out)
    assert found is not None
    return found


def test_each_token_counts_relative_to_its_size() -> None:
    wanted = torch.tensor([[[3.0, 4.0], [1000.0, 0.0]]])
    found = torch.tensor([[[3.0, 5.0], [900.0, 0.0]]])
    assert float(relative_error(found, wanted)) == pytest.approx((1 / 25 + 1 / 100) / 2)


@pytest.mark.parametrize("method", METHODS)
def test_tuning_lowers_the_error_at_unchanged_bits(
    method: str, tiny_dir: MakeDir, text_file: Path, tmp_path: Path
) -> None:
    model = tiny_dir("llama")
    tuned = signbit.quantize(model, tmp_path / "tuned", recipe(text_file, method))
    signbit.quantize(model, tmp_path / "plain", recipe(text_file, method, tune=None))
    assert len(tuned.tuning) == 2
    assert all(after <= before for before, after in tuned.tuning)
    assert sum(after for _, after in tuned.tuning) < 0.95 * sum(before for before, _ in tuned.tuning)
    assert report(tmp_path / "tuned").tuning == [list(pair) for pair in tuned.tuning]
    # Which columns are salient may differ in the second block, whose input does.
    bits = [signbit.inspect(tmp_path / out)["bits_per_weight"] for out in ("tuned", "plain")]
    assert bits[0] == pytest.approx(bits[1], rel=0.01)


def test_the_reported_error_is_that_of_what_is_stored(tiny_dir: MakeDir, text_file: Path, tmp_path: Path) -> None:
    model = tiny_dir("llama")
    signbit.quantize(model, tmp_path / "out", recipe(text_file))
    packed, _ = signbit.load(tmp_path / "out")
    original = signbit.source.open_source(str(model))
    for layer in report(tmp_path / "out").layers:
        weight = original.tensor(f"{layer.name}.weight").float()
        error = (weight - packed.get_submodule(layer.name).packed.dequantize()).norm() / weight.norm()
        assert layer.weight_error == pytest.approx(float(error), rel=1e-5)


def test_coefficients_alone_leave_signs_as_they_are(tiny_dir: MakeDir, text_file: Path, tmp_path: Path) -> None:
    model = tiny_dir("llama")
    found = {}
    for name, tune in (("plain", None), ("scales", {"signs": False}), ("all", {"lr": 1e-3, "epochs": 8})):
        signbit.quantize(model, tmp_path / name, recipe(text_file, tune=tune))
        linear = signbit.load(tmp_path / name)[0].get_submodule("model.layers.0.mlp.up_proj")
        found[name] = (linear.packed.signs, linear.packed.scales)
    assert torch.equal(found["scales"][0], found["plain"][0])
    assert not torch.equal(found["scales"][1], found["plain"][1])
    assert not torch.equal(found["all"][0], found["plain"][0])


def test_norms_are_tuned_only_if_asked_for(tiny_dir: MakeDir, text_file: Path, tmp_path: Path) -> None:
    model = tiny_dir("llama")
    before = signbit.source.open_source(str(model)).tensor("model.layers.0.input_layernorm.weight").float()
    for name, norms in (("no", False), ("yes", True)):
        signbit.quantize(model, tmp_path / name, recipe(text_file, tune={"norms": norms}))
        after = signbit.load(tmp_path / name)[0].model.layers[0].input_layernorm.weight.float()
        assert torch.allclose(after, before, atol=1e-6) is not norms


def test_a_block_that_would_get_worse_stays(tiny_dir: MakeDir, text_file: Path, tmp_path: Path) -> None:
    model = tiny_dir("llama")
    wild = {"lr": 1e3, "scale_lr": 1e3, "epochs": 1, "norms": True}
    signbit.quantize(model, tmp_path / "wild", recipe(text_file, tune=wild))
    signbit.quantize(model, tmp_path / "plain", recipe(text_file, tune=None))
    assert all(before == after for before, after in report(tmp_path / "wild").tuning)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("wild", "plain")]
    assert files[0] == files[1]


def test_a_run_that_was_stopped_ends_in_the_same_bytes(
    tiny_dir: MakeDir, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, chosen = tiny_dir("llama"), recipe(text_file, tune={"norms": True, "epochs": 1})
    signbit.quantize(model, tmp_path / "whole", chosen)
    from signbit.journal import Journal

    write = Journal.write_block

    def stop(self: Journal, index: int, block: Any) -> None:
        if index == 1:
            raise KeyboardInterrupt
        write(self, index, block)

    monkeypatch.setattr(Journal, "write_block", stop)
    with pytest.raises(KeyboardInterrupt):
        signbit.quantize(model, tmp_path / "stopped", chosen)
    monkeypatch.undo()
    signbit.quantize(model, tmp_path / "stopped", chosen, resume=True)
    for file in ("model.safetensors", "signbit_report.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "stopped" / file).read_bytes(), file


def test_keys_of_tuning_are_set_one_by_one(text_file: Path) -> None:
    chosen = Recipe({**recipe(text_file).to_dict(), "tune.epochs": 7})
    assert chosen.common.tune is not None
    assert (chosen.common.tune.epochs, chosen.common.tune.batch) == (7, 2)
    assert json.loads(json.dumps(chosen.to_dict()))["tune"]["epochs"] == 7
    assert Recipe(chosen.to_dict()).to_dict() == chosen.to_dict()


@pytest.mark.parametrize("fields", [{"tune.epoch": 1}, {"tune": 3}, {"tune.epochs": 0}])
def test_keys_that_make_no_sense_are_refused(fields: dict[str, Any], text_file: Path) -> None:
    with pytest.raises(SignbitError, match="tune"):
        recipe(text_file, **fields)


def test_tuning_needs_text(text_file: Path) -> None:
    with pytest.raises(SignbitError, match="tune needs calibration"):
        Recipe({"method": "sign", "samples": 0, "tune": {}})
