"""Sweeps: what a grid stands for, what is tried again, what is kept, and the whole of it by the command line."""

from __future__ import annotations

import csv
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from signbit import SignbitError, sweep
from signbit.cli import main
from signbit.sweeping import executors, run
from signbit.sweeping.executors import Executor, LocalExecutor, RayExecutor
from signbit.sweeping.grid import Grid, read_grid, trials_of
from signbit.sweeping.trial import Outcome, Trial, perform

MakeDir = Callable[..., Path]
SMALL = {"group_size": 32, "samples": 8, "seqlen": 48}


def write_grid(folder: Path, **keys: Any) -> Path:
    file = folder / "grid.yaml"
    file.write_text(yaml.safe_dump(keys), encoding="utf-8")
    return file


# --- grids ------------------------------------------------------------------------------------------------------------


def test_a_grid_is_all_recipes_with_all_models_and_seeds(tmp_path: Path) -> None:
    recipes = ["billm", {"recipe": "billm", "group_size": 64}, {"method": "xnor", "planes": 2}]
    grid = Grid(models=("demo", "a/b"), recipes=tuple(recipes), seeds=(0, 1), set={"samples": 4})
    trials = trials_of(grid, tmp_path)
    assert len(trials) == len({trial.name for trial in trials}) == 12
    assert all(trial.recipe["samples"] == 4 and trial.recipe["seed"] == trial.seed for trial in trials)
    assert [trial.label for trial in trials[:6:2]] == ["billm", "billm group_size=64", "method=xnor planes=2"]
    assert trials[0].recipe["calib"] == "self" and trials[-1].recipe["calib"] == "c4"
    assert trials[0].directory == tmp_path / "trials" / trials[0].name
    assert trials_of(grid, tmp_path) == trials


def test_what_is_said_twice_is_done_once(tmp_path: Path) -> None:
    grid = Grid(models=("demo",), recipes=("billm", {"recipe": "billm"}))
    assert len(trials_of(grid, tmp_path)) == 1


def test_recipes_that_are_trained_are_trained(tmp_path: Path) -> None:
    grid = Grid(models=("demo",), recipes=("onebit", "billm"))
    assert [trial.command for trial in trials_of(grid, tmp_path)] == ["train", "quantize"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: [demo]", "key 'recipes': field required"),
        ("models: []\nrecipes: [billm]", "key 'models'"),
        ("models: [demo]\nrecipes: [billm]\nseed: 1", "key 'seed': extra inputs"),
        ("models: [demo]\nrecipes: [billm]\nevaluate: {window: 1}", "key 'evaluate.window'"),
        ("models: [demo]\nrecipes: [bilm]", "recipes: bilm: no recipe or file 'bilm': did you mean 'billm'"),
        ("models: [demo]\nrecipes: [{recipe: billm, grop: 1}]", "unknown recipe key 'grop'"),
        ("models: [demo]\nrecipes: [{group_size: 1}]", "unknown method None"),
        ("- demo", "is not a mapping"),
        ("1: 2", "keys must be words"),
        ("models: [", "is not valid YAML"),
    ],
)
def test_grids_that_make_no_sense(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text(text)
    with pytest.raises(SignbitError, match=message):
        sweep(tmp_path / "grid.yaml", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_begun_is_refused(tmp_path: Path) -> None:
    grid = write_grid(tmp_path, models=["demo"], recipes=["billm"])
    with pytest.raises(SignbitError, match="cannot be read"):
        sweep(tmp_path / "none.yaml", tmp_path / "out")
    with pytest.raises(SignbitError, match="at least 1"):
        sweep(grid, tmp_path / "out", jobs=0)
    for out in (tmp_path / "none" / "out", grid):
        with pytest.raises(SignbitError, match="choose another"):
            sweep(grid, out)


# --- trying again, and keeping ----------------------------------------------------------------------------------------


class Scripted:
    """Trials end as the script says: for each, the failures of its first tries."""

    def __init__(self, script: dict[str, list[Outcome]]) -> None:
        self.script, self.tried = script, list[str]()

    def run(self, trials: Sequence[Trial]) -> Iterator[tuple[Trial, Outcome]]:
        for trial in trials:
            self.tried.append(trial.label)
            left = self.script.get(trial.label, [])
            outcome = left.pop(0) if left else Outcome()
            if outcome.failure is None:
                trial.directory.mkdir(parents=True, exist_ok=True)
                facts = {"bits_per_weight": 1.0, "nominal_bits_per_weight": 1.0, "file_bytes": 10, "seconds": 2.0}
                evaluation = {"perplexity": {"t": 7.0}, "divergence": {"t": {"kl": 0.5}}}
                kept = {"evaluation": trial.evaluation, "result": {**facts, "evaluation": evaluation}}
                (trial.directory / "result.json").write_text(json.dumps(kept))
            yield trial, outcome


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, list[Outcome]]], Scripted]:
    def use(script: dict[str, list[Outcome]]) -> Scripted:
        executor = Scripted(script)
        monkeypatch.setattr(run, "LocalExecutor", lambda jobs: executor)
        monkeypatch.setattr(run, "compare", lambda *_, **__: {})
        return executor

    return use


def test_failures_are_tried_again_and_then_listed(
    scripted: Callable[..., Scripted], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipes = ["billm", "xnor", "sign", "gptq-4"]
    grid = write_grid(tmp_path, models=["demo"], recipes=recipes, retries=2)
    lost, wrong = Outcome("quantize was ended by SIGKILL"), Outcome("quantize: no such text", final=True)
    executor = scripted({"xnor": [lost, lost], "sign": [lost, lost, lost], "gptq-4": [wrong]})
    assert main(["sweep", str(grid), "--out", str(tmp_path / "out")]) == 2
    assert sorted(executor.tried) == sorted(["billm", *["xnor"] * 3, *["sign"] * 3, "gptq-4"])
    said = capsys.readouterr().err
    assert "2 of 4 trials failed" in said and "no such text" in said and "SIGKILL; it is tried again" in said
    rows = json.loads((tmp_path / "out/results.json").read_text())
    assert [row["failure"] for row in rows] == [None, None, lost.failure, wrong.failure]
    with (tmp_path / "out/results.csv").open() as file:
        assert [row["perplexity t"] for row in csv.DictReader(file)] == ["7.0", "7.0", "", ""]
    # What is missing, and nothing else, is done by the same command.
    executor = scripted({})
    assert main(["sweep", str(grid), "--out", str(tmp_path / "out")]) == 0
    assert executor.tried == ["sign", "gptq-4"]
    assert all(row["failure"] is None for row in json.loads((tmp_path / "out/results.json").read_text()))
    executor = scripted({})
    sweep(write_grid(tmp_path, models=["demo"], recipes=[*recipes, "hbllm-row"]), tmp_path / "out")
    assert executor.tried == ["hbllm-row"]


def test_another_evaluation_is_another_result(scripted: Callable[..., Scripted], tmp_path: Path) -> None:
    scripted({})
    sweep(write_grid(tmp_path, models=["demo"], recipes=["billm"]), tmp_path / "out")
    executor = scripted({})
    sweep(write_grid(tmp_path, models=["demo"], recipes=["billm"], evaluate={"windows": 3}), tmp_path / "out")
    assert executor.tried == ["billm"]


def test_so_many_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(2, timeout=30)

    def meet(trial: Trial) -> Outcome:
        together.wait()
        return Outcome(trial.label)

    monkeypatch.setattr(executors, "perform", meet)
    trials = trials_of(Grid(models=("demo",), recipes=("billm", "xnor", "sign", "gptq-4")), tmp_path)
    found = {trial.label: outcome.failure for trial, outcome in LocalExecutor(2).run(trials)}
    assert found == {label: label for label in ("billm", "xnor", "sign", "gptq-4")}


# --- for real ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep(tiny_dir: MakeDir, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two trials that end well, one that cannot, and what became of a process that was killed."""
    model, out = tiny_dir("llama"), tmp_path / "out"
    grid = write_grid(
        tmp_path,
        models=[str(model)],
        recipes=["billm", {"method": "xnor", "planes": 2}, {"method": "sign", "seqlen": 4096}],
        set={**SMALL, "calib": str(text_file)},
        evaluate={"perplexity": [str(text_file)], "seqlen": 64, "windows": 4},
    )
    # SMALL's seqlen gives way to the recipe's own, which is beyond the model.
    assert main(["sweep", str(grid), "--out", str(out), "--jobs", "2"]) == 2
    said = capsys.readouterr().err
    assert "1 of 3 trials failed, the first: quantize: seqlen 4096 is beyond the model's 256 positions" in said
    rows = json.loads((out / "results.json").read_text())
    assert [bool(row["failure"]) for row in rows] == [False, False, True]
    assert all(row["bits_per_weight"] > 1 and row[f"perplexity {text_file}"] > 1 for row in rows[:2])
    assert all(row[f"kl {text_file}"] > 0 for row in rows[:2])
    page = (out / "model.html").read_text()
    assert page.count("xnor") and page.count("billm")
    trial = trials_of(read_grid(grid), out)[0]
    assert (trial.checkpoint / "model.safetensors").is_file() and "quantizing" in (
        trial.directory / "log.txt"
    ).read_text()
    # A trial's first command goes on from what is there; what it says is kept behind what was said before.
    (trial.directory / "result.json").unlink()
    before = (trial.checkpoint / "model.safetensors").stat().st_mtime_ns
    assert perform(trial) == Outcome()
    assert (trial.checkpoint / "model.safetensors").stat().st_mtime_ns == before
    broken = replace(trial, evaluation={**trial.evaluation, "perplexity": ["none.txt"]})
    failed = perform(broken)
    assert failed.final and failed.failure is not None and "none.txt" in failed.failure


@pytest.mark.slow
def test_on_ray(tiny_dir: MakeDir, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="Ray, a quarter of a gigabyte, is not among the development packages")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # workers give way to everything else, so on a busy machine wait
    grid = write_grid(
        tmp_path,
        models=[str(tiny_dir("llama"))],
        recipes=[{"method": "xnor", "planes": 2}, {"method": "sign", "seqlen": 4096}],
        set={**SMALL, "calib": str(text_file)},
        evaluate={"perplexity": [str(text_file)], "seqlen": 64, "windows": 4},
    )
    try:
        with pytest.raises(SignbitError, match="1 of 2 trials failed"):
            sweep(grid, tmp_path / "out", jobs=2, ray="here")
        rows = json.loads((tmp_path / "out/results.json").read_text())
        assert [row["failure"] is None for row in rows] == [True, False]
    finally:
        ray.shutdown()


def test_ray_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(SignbitError, match=r"Ray is not installed: pip install 'signbit\[sweep\]'"):
        RayExecutor("auto", 1, 0)


def test_both_executors_are_executors() -> None:
    wanted: list[type[Executor]] = [LocalExecutor, RayExecutor]
    assert all(callable(one.run) for one in wanted)
