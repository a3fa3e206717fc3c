"""``signbit eval``: open what is to be evaluated, score it on each text, ask it each task's questions."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from signbit.calibration.self_text import write_tokens
from signbit.calibration.text import SELF, read_text
from signbit.calibration.tokens import check_seqlen, tokenize
from signbit.errors import SignbitError
from signbit.evaluation.perplexity import score, windows_of
from signbit.evaluation.store import open_store
from signbit.evaluation.tasks import harness_version, load_tasks, run_tasks
from signbit.inference import open_model
from signbit.modules import set_activations
from signbit.progress import Progress, Silent
from signbit.source import resolve

# Self-written text for evaluation is written with other seeds than any calibration would use by default.
_HELD_OUT_SEED = 1_000_003
_SELF_WINDOWS = 4
_TEXT = "wikitext2"


def evaluate(
    model: str | Path,
    *,
    perplexity: Sequence[str | Path] | str | Path | None = None,
    seqlen: int = 2048,
    windows: int | None = None,
    against: str | Path | None = None,
    tasks: Sequence[str] | str = (),
    task_data: str | Path | None = None,
    limit: int | None = None,
    cache: str | Path | None = None,
    fresh: bool = False,
    device: str = "auto",
    activations: str = "exact",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score MODEL, packed as it is stored, on each text SOURCE in ``perplexity`` and on each of ``tasks``.

    windows: only the first so many windows of ``seqlen`` tokens. against: the original model, for divergence.
    activations: "int8" rounds what packed matrices of MODEL are multiplied with to 8 bits (set_activations). The
    source ``self`` is text written by ``against`` if given, else by the model; perplexity is by default that on
    wikitext2, or none if there are tasks.

    tasks: names of lm-evaluation-harness, or onebit, billm or stbllm for the tasks that a paper averages. task_data: a
    directory with the benchmarks' files, in place of the hub. limit: only the first so many rows of each task. cache:
    where answers are kept, by default in the user's cache directory; fresh: ask again what was answered before.

    Returns what ``signbit eval --json`` prints. SignbitError for anything that cannot be read, or a task that is not
    known.
    """
    progress = progress or Silent()
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    if perplexity is None:
        perplexity = () if names and against is None else (_TEXT,)
    sources = [str(s) for s in ([perplexity] if isinstance(perplexity, str | Path) else perplexity)]
    if seqlen < 2 or (windows is not None and windows < 1):
        raise SignbitError("seqlen must be at least 2 and windows at least 1")
    if not sources and not names:
        raise SignbitError("nothing to evaluate: name at least one text source or task")
    started = time.perf_counter()
    texts = {source: None if source == SELF else read_text(source, "test") for source in sources}
    path = resolve(str(model))
    loaded = load_tasks(names, None if task_data is None else Path(task_data), limit) if names else []

    @functools.cache
    def opened() -> tuple[PreTrainedModel, Any]:
        scored, tokenizer = open_model(str(model), device=device, trust_remote_code=trust_remote_code)
        set_activations(scored, activations)
        return scored, tokenizer

    original: PreTrainedModel | None = None
    if against is not None:
        original, _ = open_model(str(against), device=device, trust_remote_code=trust_remote_code)
        if original.config.get_text_config().vocab_size != opened()[0].config.get_text_config().vocab_size:
            raise SignbitError(f"{against} and {model} have different vocabularies: they cannot be compared")
    result: dict[str, Any] = {"model": str(model), "perplexity": {}, "tokens": {}, "tasks": {}, "seqlen": seqlen}
    if original is not None:
        result |= {"against": str(against), "original_perplexity": {}, "divergence": {}}
    if texts:
        _score_texts(result, texts, opened, original, windows, progress)
    if loaded:
        harness = harness_version()
        with open_store(
            path, device=device, activations=activations, cache=cache, fresh=fresh, harness=harness
        ) as store:
            result |= run_tasks(names, loaded, limit, opened, store, progress)
        result |= {"limit": limit, "harness": harness}
    result["seconds"] = round(time.perf_counter() - started, 3)
    return result


def _score_texts(
    result: dict[str, Any],
    texts: dict[str, str | None],
    opened: Callable[[], tuple[PreTrainedModel, Any]],
    original: PreTrainedModel | None,
    windows: int | None,
    progress: Progress,
) -> None:
    """Add what is found on each text; None is one that a model writes."""
    scored, tokenizer = opened()
    seqlen = result["seqlen"]
    check_seqlen(scored.config, seqlen)
    for source, text in texts.items():
        if text is None:
            author = original if original is not None else scored
            cut = write_tokens(author, windows or _SELF_WINDOWS, seqlen, _HELD_OUT_SEED, progress)
        else:
            cut = windows_of(tokenize(tokenizer, text, scored.config), seqlen, windows, source)
        found = score(scored, cut, progress, f"perplexity on {source}", original)
        result["perplexity"][source] = found.perplexity
        result["tokens"][source] = found.tokens
        if original is not None:
            result["original_perplexity"][source] = found.original_perplexity
            result["divergence"][source] = {"kl": found.kl, "top1_agreement": found.top1}
