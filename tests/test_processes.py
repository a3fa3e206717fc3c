"""Several processes make what one makes, and end together."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import signbit
from launching import launch, process_of
from signbit import Recipe, SignbitError
from signbit.blockwise.calibrate import share_steps
from signbit.blockwise.job import Job
from signbit.journal import FinishedBlock, Journal
from signbit.modules import QuantizedLinear
from signbit.processes import LEFT_ALONE, Processes, deal, together
from signbit.progress import Silent
from signbit.report.quantization import QuantizationReport
from signbit.source import open_source
from tiny import SMALL_RECIPE

MakeDir = Callable[..., Path]
WRITE_BLOCK = Journal.write_block

# Two planes and scales alone, in float32: what tuning makes of them follows smoothly from sums.
SCALES: dict[str, Any] = {
    "method": "xnor",
    "planes": 2,
    "tune": {"epochs": 4, "signs": False, "scale_lr": 1e-2, "precision": "float32"},
}
# How much the logits may differ. Where choices are made, sums in another order turn one now and then, and what comes
# after goes another way; sign factors, which settle slowly, go quite another.
SMOOTH, CHOICES, ANY = 1e-2, 0.4, 1.2
CASES: dict[str, tuple[str, dict[str, Any], float]] = {
    "billm": ("llama", {}, CHOICES),
    "begun by one": ("llama", {"seed": 3}, CHOICES),
    "bias correction": ("qwen3", {"bias_correction": True}, CHOICES),
    "experts": ("qwen3_moe", {}, CHOICES),
    "experts that one process never reaches": ("mixtral", {"samples": 2, "seqlen": 2}, CHOICES),
    "survey of weights": ("llama", {"method": "stbllm"}, CHOICES),
    "survey of inputs": ("gemma3", {"method": "stbllm", "allocation": "outlier"}, CHOICES),
    "arb-llm": ("llama", {"method": "arb-llm"}, CHOICES),
    "hbllm": ("llama", {"method": "hbllm"}, CHOICES),
    "pb-llm": ("llama", {"method": "pb-llm"}, CHOICES),
    "gptq": ("gpt2", {"method": "gptq", "bits": 4}, CHOICES),
    "onebit": ("llama", {"method": "onebit", "group_size": 0}, SMOOTH),
    "sign": ("llama", {"method": "sign", "group_size": 0, "samples": 0}, SMOOTH),
    "rtn": ("opt", {"method": "rtn", "bits": 3}, SMOOTH),
    "self-written text": ("llama", {"calib": "self", "samples": 4}, CHOICES),
    "odd batches": ("llama", {**SCALES, "samples": 7, "tune": {**SCALES["tune"], "batch": 3, "norms": True}}, CHOICES),
    "one sequence a step": ("llama", {**SCALES, "samples": 4, "tune": {**SCALES["tune"], "batch": 1}}, CHOICES),
    "tuned experts": ("mixtral", {**SCALES, "feedback": "none", "seqlen": 4, "samples": 6}, SMOOTH),
    "tuned signs": (
        "llama",
        {**SCALES, "tune": {"epochs": 4, "batch": 3, "lr": 1e-3, "precision": "float32"}},
        CHOICES,
    ),
    "tuned in bfloat16": ("llama", {**SCALES, "tune": {**SCALES["tune"], "precision": "bfloat16"}}, CHOICES),
    "budget": (
        "llama",
        {"method": "xnor", "mean": False, "budget": {"bits": 3.0, "vary": "planes", "values": [1, 2, 3]}},
        CHOICES,
    ),
    "sign factors": ("llama", {"method": "sign-factors", "group_size": 0, "bits": 4, "iterations": 10}, ANY),
}


def command(model: Path, out: Path, text: Path, *more: str) -> list[str]:
    keys = {**SMALL_RECIPE, "calib": str(text)}
    settings = [word for key, value in keys.items() if key != "method" for word in ("--set", f"{key}={value}")]
    return ["-m", "signbit", "quantize", str(model), "--out", str(out), "--device", "cpu", *settings, *more]


def files(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def quantize(case: dict[str, Any]) -> None:
    """On one thread, as processes of their own are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        signbit.quantize(case["model"], case["out"], Recipe(case["recipe"]), device="cpu")
    finally:
        torch.set_num_threads(threads)


def stop_after_writing(journal: Journal, index: int, block: FinishedBlock) -> None:
    WRITE_BLOCK(journal, index, block)
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def made(tiny_dir: MakeDir, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Path]]:
    """The checkpoint of each case as one process makes it, and as two do: all of them in one start, which is slow."""
    folder = tmp_path_factory.mktemp("cases")
    cases: list[dict[str, Any]] = []
    for name, (family, keys, _) in CASES.items():
        recipe: dict[str, Any] = {**SMALL_RECIPE, "calib": str(text_file), **keys}
        if not recipe["group_size"]:
            del recipe["group_size"]
        cases.append({"model": str(tiny_dir(family)), "out": str(folder / f"{name} 2"), "recipe": recipe})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "write_block", stop_after_writing)
        quantize(next(case for case in cases if case["out"] == str(folder / "begun by one 2")))
    (folder / "cases.json").write_text(json.dumps(cases))
    launched = launch(2, str(Path(__file__).with_name("quantize_cases.py")), str(folder / "cases.json"))
    for case in cases:
        quantize({**case, "out": f"{case['out'][:-1]}1"})
    _, errors = launched.communicate(timeout=240)
    assert launched.returncode == 0, errors
    return lambda name: [folder / f"{name} {count}" for count in (1, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_make_what_one_makes(name: str, made: Callable[[str], list[Path]]) -> None:
    one, two = made(name)
    models = [signbit.load(path)[0] for path in (one, two)]
    ids = torch.arange(40).unsqueeze(0) + 5
    with torch.no_grad():
        logits = [model(ids).logits for model in models]
    allowed = CASES[name][2]
    assert float((logits[0] - logits[1]).norm()) <= allowed * float(logits[0].norm())
    first, second = (QuantizationReport.read(path) for path in (one, two))
    assert first is not None and second is not None
    assert second.unquantized == first.unquantized
    for layer, wanted in zip(second.layers, first.layers, strict=True):
        assert (layer.name, layer.notes, layer.damping) == (wanted.name, wanted.notes, wanted.damping)
        if wanted.output_error is not None:
            # In the first block nothing has gone another way yet: half of the text would show.
            close = allowed / 20 if ".0." in layer.name.partition("experts")[0] else max(0.1, allowed)
            assert layer.output_error == pytest.approx(wanted.output_error, rel=close, abs=1e-4)
    for after, wanted_after in zip(second.tuning[:1], first.tuning[:1], strict=True):
        assert after == pytest.approx(wanted_after, rel=0.01)
    assert len(second.tuning) == len(first.tuning)
    if allowed == SMOOTH:
        pairs = zip(models[0].modules(), models[1].modules(), strict=True)
        packed = [(a.packed, b.packed) for a, b in pairs if isinstance(a, QuantizedLinear)]
        equal = [torch.isclose(a.dequantize(), b.dequantize(), rtol=1e-2, atol=1e-4) for a, b in packed]
        assert torch.cat([one.flatten() for one in equal]).float().mean() > 0.999


@pytest.fixture(scope="module")
def undisturbed(tiny_dir: MakeDir, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    launched = launch(2, *command(tiny_dir("gemma3"), out, text_file))
    _, errors = launched.communicate(timeout=120)
    assert launched.returncode == 0, errors
    assert errors.count("bits per weight") == 1  # one of them speaks
    return files(out)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_dies_the_other_stops_and_the_run_resumes(
    victim: int, undisturbed: dict[str, bytes], tiny_dir: MakeDir, text_file: Path, tmp_path: Path
) -> None:
    arguments = command(tiny_dir("gemma3"), tmp_path / "out", text_file)
    launched = launch(2, *arguments)
    finished = tmp_path / "out.partial" / "block-00001.safetensors"
    while not finished.exists() and launched.poll() is None:
        time.sleep(0.01)
    kept = finished.read_bytes()
    os.kill(process_of(launched.pid, victim), signal.SIGKILL)
    _, errors = launched.communicate(timeout=40)
    assert launched.returncode != 0
    assert errors.count(f"signbit: {LEFT_ALONE}") == 1
    assert "internal error" not in errors
    assert finished.read_bytes() == kept
    launched = launch(2, *arguments, "--resume")
    _, errors = launched.communicate(timeout=120)
    assert launched.returncode == 0, errors
    assert files(tmp_path / "out") == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_more_processes_than_samples_are_refused(tiny_dir: MakeDir, text_file: Path, tmp_path: Path) -> None:
    several = Processes("cpu")
    several.count = 9
    recipe = Recipe({**SMALL_RECIPE, "calib": str(text_file)})
    with closing(open_source(str(tiny_dir("llama")))) as source:
        job = Job(source, recipe, Journal(tmp_path / "out"), several, Silent())
        with pytest.raises(SignbitError, match="9 processes share 8 calibration samples: start at most 8"):
            job.check()


@given(samples=st.integers(1, 20), size=st.integers(1, 6), count=st.integers(1, 5), seqlen=st.just(2))
def test_the_processes_shares_of_a_batch_are_the_batch(samples: int, size: int, count: int, seqlen: int) -> None:
    tokens = torch.arange(samples * seqlen).view(samples, seqlen)
    shared = [share_steps(tokens, size, rank, count) for rank in range(count)]
    for i, batch in enumerate(tokens.split(size)):
        assert sum(steps[i].share for _, steps in shared) == pytest.approx(1)
        parts = [batches[at] for batches, steps in shared if (at := steps[i].at) is not None]
        assert torch.equal(torch.cat(parts).sort(0).values, batch)
    lengths = [sum(map(len, batches)) for batches, _ in shared]
    assert max(lengths) - min(lengths) <= 1


def test_work_is_dealt_by_cost() -> None:
    assert deal([3, 1, 5.4, 2.7], 2) == [1, 0, 0, 1]
    assert deal([1, 1, 1], 1) == [0, 0, 0]
    assert deal([], 2) == []
    assert sorted(deal([1] * 5, 8)) == [0, 1, 2, 3, 4]


def test_only_errors_of_connections_mean_that_another_process_has_ended() -> None:
    lost = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:21"
    for error in (RuntimeError(lost), torch.distributed.DistBackendError("NCCL communicator was aborted")):
        with pytest.raises(SignbitError, match=LEFT_ALONE), together():
            raise error
    for own in ("ProcessGroupGloo::broadcast: invalid root rank: 5", "cannot write /home/gloo/snapshot.safetensors"):
        with pytest.raises(RuntimeError, match=own), together():
            raise RuntimeError(own)


def test_one_process_asks_nobody() -> None:
    alone = Processes("cpu")
    values = torch.ones(2)
    alone.add(values)
    parameter = torch.nn.Parameter(values)
    alone.add_gradients([parameter])
    assert parameter.grad is None and values.tolist() == [1, 1]
    assert (alone.first(lambda: 3), alone.tell("x"), alone.is_first) == (3, ["x"], True)
