"""A grid: the YAML file that says what a sweep tries, and the trials that it stands for.

models: [demo, path/to/model]
recipes: [billm, my.yaml, {recipe: billm, group_size: 64}, {method: xnor, planes: 2}]
seeds: [0, 1]                       # the recipes' own if there are none
set: {samples: 32, seqlen: 512}     # in every recipe
evaluate: {perplexity: [text.txt], seqlen: 2048, windows: 20, tasks: [piqa], limit: 100}
retries: 1
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from signbit.errors import SignbitError
from signbit.recipe import Recipe
from signbit.sweeping.trial import Trial


class Evaluation(BaseModel):
    """Keys below ``evaluate``: what ``signbit compare`` is to measure of each checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    perplexity: tuple[str, ...] = Field((), description="texts to score; wikitext2 if no task is named either")
    seqlen: int = Field(2048, ge=2, description="tokens in a window")
    windows: int | None = Field(None, ge=1, description="only the first so many windows")
    tasks: tuple[str, ...] = Field((), description="tasks of lm-evaluation-harness")
    task_data: str | None = Field(None, description="directory with the benchmarks' files")
    limit: int | None = Field(None, ge=1, description="only the first so many rows of each task")

    def absolute(self) -> Evaluation:
        """With paths that mean the same anywhere."""
        texts = tuple(_absolute(text) for text in self.perplexity)
        data = None if self.task_data is None else _absolute(self.task_data)
        return self.model_copy(update={"perplexity": texts, "task_data": data})


class Grid(BaseModel):
    """The keys of a grid."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: tuple[str, ...] = Field(min_length=1, description="what is quantized")
    recipes: tuple[str | dict[str, Any], ...] = Field(
        min_length=1, description="presets, YAML files, or keys; beside keys, 'recipe' names what they change"
    )
    seeds: tuple[int, ...] = Field((), description="each recipe with each of these; none: with its own")
    set: dict[str, Any] = Field({}, description="keys of every recipe")
    evaluate: Evaluation = Field(Evaluation(), description="what is measured of each checkpoint")
    retries: int = Field(1, ge=0, description="how often a trial that failed is tried again")
    cpus: int = Field(1, ge=1, description="threads of a trial")
    gpus: float = Field(0, ge=0, description="GPUs of a trial, which Ray gives it")


def read_grid(file: Path) -> Grid:
    try:
        fields = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SignbitError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise SignbitError(f"{file} cannot be read: {error.strerror}") from error
    if not isinstance(fields, dict):
        raise SignbitError(f"{file} is not a mapping of keys such as models and recipes")
    try:
        return Grid(**fields)
    except (ValidationError, TypeError) as error:
        if isinstance(error, TypeError):
            raise SignbitError(f"{file}: keys must be words") from error
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise SignbitError(f"{file}: key {key!r}: {first['msg'].lower()}") from error


def trials_of(grid: Grid, out: Path) -> list[Trial]:
    """Every recipe with every model and every seed, each with its directory in ``out``; each checked."""
    trials: dict[str, Trial] = {}
    for model in grid.models:
        for entry in grid.recipes:
            for seed in grid.seeds or (None,):
                trial = _trial(grid, model, entry, seed, out)
                trials.setdefault(trial.name, trial)  # the same thing said twice is done once
    return list(trials.values())


def _trial(grid: Grid, model: str, entry: str | dict[str, Any], seed: int | None, out: Path) -> Trial:
    changes = {**grid.set, **({} if seed is None else {"seed": seed})}
    if isinstance(entry, str):
        base, own, label = entry, {}, Path(entry).stem
    else:
        own = dict(entry)
        base = own.pop("recipe", "")
        words = [Path(str(base)).stem] if base else []
        label = " ".join([*words, *(f"{key}={json.dumps(value)}".replace('"', "") for key, value in own.items())])
    try:
        recipe = Recipe.load(str(base), {**changes, **own}) if base else Recipe({**changes, **own})
    except SignbitError as error:
        raise SignbitError(f"recipes: {label or entry}: {error}") from error
    fields = recipe.for_model(model).to_dict()
    fields["calib"] = _absolute(str(fields["calib"]))
    model = _absolute(model)
    words = [Path(model).name, label, *([] if seed is None else [f"seed {seed}"])]
    digest = hashlib.sha256(json.dumps([model, fields], sort_keys=True).encode()).hexdigest()[:8]
    name = "-".join(re.sub(r"[^A-Za-z0-9.=]+", "-", word).strip("-") for word in words)[:80]
    return Trial(
        name=f"{name}-{digest}",
        model=model,
        label=label,
        seed=int(fields["seed"]),
        recipe=fields,
        command="train" if recipe.training is not None else "quantize",
        evaluation=grid.evaluate.absolute().model_dump(mode="json"),
        directory=out / "trials" / f"{name}-{digest}",
        answers=out / "answers",
        cpus=grid.cpus,
    )


def _absolute(path: str) -> str:
    """What names a file or directory here, as a path that means the same elsewhere; all else as it is."""
    found = Path(path).expanduser()
    return str(found.resolve()) if found.exists() and path != "demo" else path
