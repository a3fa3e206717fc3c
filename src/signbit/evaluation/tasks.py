"""Zero-shot tasks through lm-evaluation-harness, with its prompts, metrics and standard errors; none is rewritten.

A task is loaded from the harness's own configuration, with the rows of the hub or, for ``task_data``, of local files
(task_data.py). The harness then makes its requests, asks a model that keeps answers (harness_model.py) and computes its
metrics. Standard errors are the harness's, too: closed form for means, 100,000 resamples for LAMBADA's perplexity. No
examples are in prompts, except for tasks whose configuration fixes their number.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import io
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partialmethod
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from signbit.errors import SignbitError
from signbit.evaluation.groups import GROUPS, average, expand
from signbit.evaluation.store import Store, hash_of
from signbit.evaluation.task_data import local_configuration
from signbit.progress import Progress
from signbit.source import first_line

# Where the harness keeps the tasks that most ask for: reading these takes milliseconds, all its 14,000 ten seconds.
_FOLDERS = (
    *("arc", "glue/rte", "hellaswag", "lambada", "mmlu/default"),
    *("openbookqa", "piqa", "super_glue/boolq", "winogrande"),
)
# What the harness's own entry point seeds the choice of examples with.
_EXAMPLES_SEED = 1234


@dataclass
class Loaded:
    """What one name stands for in the harness: a task, or a group of its own with all tasks in it."""

    name: str
    contents: dict[str, Any]


def harness_version() -> str:
    """The version of lm-evaluation-harness; SignbitError if it is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise SignbitError("tasks need lm-evaluation-harness: pip install 'signbit[eval]'")
    return importlib.metadata.version("lm_eval")


def load_tasks(names: Sequence[str], task_data: Path | None, limit: int | None) -> list[Loaded]:
    """The tasks that are named, by themselves or by a group, with their rows.

    SignbitError if a name is unknown, or rows cannot be had.
    """
    harness_version()
    if limit is not None and limit < 1:
        raise SignbitError("limit must be at least 1: it is the number of rows of each task")
    with _quiet():
        wanted = expand(names)
        manager = _manager(wanted)
        return [_load(manager, name, task_data) for name in wanted]


def run_tasks(
    names: Sequence[str],
    loaded: Sequence[Loaded],
    limit: int | None,
    opened: Callable[[], tuple[PreTrainedModel, Any]],
    store: Store,
    progress: Progress,
) -> dict[str, Any]:
    """``tasks`` and ``groups`` of the result of an evaluation: metrics by task, averages by named group."""
    from signbit.evaluation.harness_model import KeptAnswers

    model = KeptAnswers(opened, store, progress)
    tasks: dict[str, dict[str, Any]] = {}
    for task in loaded:
        with _quiet():
            key = hash_of([task.name, _rows(task, limit)])
            if key not in store:
                model.task = task.name
                store.put(key, _evaluate(model, task, limit))
        tasks |= store[key]
    return {"tasks": tasks, "groups": {name: average(name, tasks) for name in names if name in GROUPS}}


def _manager(names: Sequence[str]) -> Any:
    """The harness's manager of its configurations, with at least those of ``names``."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=[root / folder for folder in _FOLDERS])
    if all(name in manager.all_tasks for name in names):
        return manager
    manager = lm_eval.tasks.TaskManager()
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, [*GROUPS, *manager.all_tasks], n=3)
            hint = f"is it {' or '.join(near)}?" if near else "lm_eval ls tasks lists them"
            raise SignbitError(f"the harness {harness_version()} has no task {name!r}: {hint}")
    return manager


def _load(manager: Any, name: str, task_data: Path | None) -> Loaded:
    try:
        if task_data is None:
            contents = manager.load([name])
        else:
            # Keys of a task within a group take the place of its own.
            local = {"group": "local", "task": [local_configuration(name, task_data)]}
            contents = {"tasks": manager.load(local)["tasks"], "groups": {}}
    except SignbitError:
        raise
    except Exception as error:
        # Whatever the data sets library, the network or the code of one of 14,000 tasks may raise.
        raise SignbitError(
            f"{name} could not be loaded ({first_line(error)}): offline, give the benchmarks' files with --task-data"
        ) from error
    for task in contents["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_EXAMPLES_SEED)
    return Loaded(name, contents)


def _rows(loaded: Loaded, limit: int | None) -> list[Any]:
    """All that a result depends on beside the model: tasks, their versions and the rows that they are scored on."""
    tasks = loaded.contents["tasks"].items()
    return [[name, task.VERSION, [row for _, row in task.doc_iterator(limit=limit)]] for name, task in tasks]


def _evaluate(model: Any, loaded: Loaded, limit: int | None) -> dict[str, dict[str, Any]]:
    """The harness's results by task; those of a group of its own have the group's and all its tasks'."""
    import lm_eval

    try:
        found = lm_eval.evaluate(lm=model, task_dict=loaded.contents, limit=limit, log_samples=False)
    except OverflowError as error:
        raise SignbitError(f"{loaded.name}: the model is so far off that a metric is beyond all numbers") from error
    versions = found["versions"]
    return {name: _metrics(values, versions.get(name)) for name, values in found["results"].items()}


def _metrics(values: dict[str, Any], version: Any) -> dict[str, Any]:
    """Metrics by the harness's names (without the filter, if it is none), each with its standard error; ``stderr`` is
    that of the first of them, or of acc."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        if comma:
            finite = isinstance(value, int | float) and math.isfinite(value)
            found[metric if filtered == "none" else key] = float(value) if finite else None
    metrics = [key for key in found if "_stderr" not in key]
    main = "acc" if "acc" in found else next(iter(metrics), "")
    error = found.get(f"{main}_stderr" if "," not in main else main.replace(",", "_stderr,", 1))
    return {**found, "stderr": error, "n": values.get("sample_len", 0), "version": version}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars, prints and warnings of the harness and its libraries: signbit reports progress itself."""
    import datasets
    from tqdm import tqdm

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    bars = not datasets.are_progress_bars_disabled()
    original = tqdm.__init__
    tqdm.__init__ = partialmethod(original, disable=True)
    datasets.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        tqdm.__init__ = original
        if bars:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
