"""``signbit eval``: open what is to be evaluated, score it on each text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from signbit.calibration.self_text import write_tokens
from signbit.calibration.text import SELF, read_text
from signbit.calibration.tokens import check_seqlen, tokenize
from signbit.errors import SignbitError
from signbit.evaluation.perplexity import score, windows_of
from signbit.inference import open_model
from signbit.modules import set_activations
from signbit.progress import Progress, Silent

# Self-written text for evaluation is written with other seeds than any calibration would use by default.
_HELD_OUT_SEED = 1_000_003
_SELF_WINDOWS = 4


def evaluate(
    model: str | Path,
    *,
    perplexity: Sequence[str | Path] | str | Path = ("wikitext2",),
    seqlen: int = 2048,
    windows: int | None = None,
    against: str | Path | None = None,
    device: str = "auto",
    activations: str = "exact",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score MODEL, packed as it is stored, on each text SOURCE in ``perplexity``.

    windows: only the first so many windows of ``seqlen`` tokens. against: the original model, for divergence.
    activations: "int8" rounds what packed matrices of MODEL are multiplied with to 8 bits (set_activations). The
    source ``self`` is text written by ``against`` if given, else by the model. Returns what ``signbit eval --json``
    prints.
    """
    progress = progress or Silent()
    sources = [str(s) for s in ([perplexity] if isinstance(perplexity, str | Path) else perplexity)]
    if seqlen < 2 or (windows is not None and windows < 1):
        raise SignbitError("seqlen must be at least 2 and windows at least 1")
    if not sources:
        raise SignbitError("nothing to evaluate: name at least one text source")
    started = time.perf_counter()
    texts = {source: None if source == SELF else read_text(source, "test") for source in sources}
    scored, tokenizer = open_model(str(model), device=device, trust_remote_code=trust_remote_code)
    set_activations(scored, activations)
    check_seqlen(scored.config, seqlen)
    original: PreTrainedModel | None = None
    if against is not None:
        original, _ = open_model(str(against), device=device, trust_remote_code=trust_remote_code)
        if original.config.get_text_config().vocab_size != scored.config.get_text_config().vocab_size:
            raise SignbitError(f"{against} and {model} have different vocabularies: they cannot be compared")
    result: dict[str, Any] = {"model": str(model), "perplexity": {}, "tokens": {}, "tasks": {}, "seqlen": seqlen}
    if original is not None:
        result |= {"against": str(against), "original_perplexity": {}, "divergence": {}}
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
    result["seconds"] = round(time.perf_counter() - started, 3)
    return result
