"""What a comparison knows of a model: its bytes, how well it predicts, how fast it is, what it writes, how it was made.

One model is measured after the other, so that at most two are in memory, it and the original. Speed and memory are
measured in a process of their own: whatever ran before in this one would show in both.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from signbit import accounting, inference
from signbit.calibration.text import SELF, read_text, text_fingerprint
from signbit.errors import SignbitError
from signbit.evaluation import evaluate
from signbit.evaluation.store import Store, content_hash, hash_of, open_store
from signbit.evaluation.tasks import load_tasks
from signbit.memory import return_free_memory
from signbit.modules import set_activations
from signbit.progress import Progress
from signbit.report.making import Making, making_of
from signbit.safetensors_file import files_of
from signbit.source import load_tokenizer, resolve

PROMPTS = ("The capital of France is", "Once upon a time", "To make a good cup of tea,")
_DECODED_TOKENS = 32


@dataclass(frozen=True)
class Measures:
    """What is to be measured; the fields are the arguments of :func:`signbit.compare`."""

    perplexity: Sequence[str]
    seqlen: int
    windows: int | None
    tasks: Sequence[str]
    task_data: str | Path | None
    limit: int | None
    cache: str | Path | None
    fresh: bool
    against: str | None
    prompts: Sequence[str]
    max_tokens: int
    speed: bool
    device: str
    activations: str
    trust_remote_code: bool

    @property
    def running(self) -> dict[str, Any]:
        """How models are run, for ``evaluate``."""
        return {key: getattr(self, key) for key in ("device", "activations", "trust_remote_code")}

    def check(self) -> None:
        """Refuse, before anything is measured, what would fail for the first model, or the last."""
        for source in self.perplexity:
            if source != SELF:
                read_text(source, "test")
            elif self.against is None:
                raise SignbitError(
                    "the text 'self' is written by the original: add it to the models, or name it with --against"
                )
        if self.tasks:
            load_tasks(self.tasks, None if self.task_data is None else Path(self.task_data), self.limit)
        for prompt in self.prompts:
            inference.check_request(prompt, self.max_tokens)


@dataclass
class ModelFacts:
    """All that is known of one model. file_bytes: of its weights, as they lie on disk. vocabulary: tokens by name, to
    tell whether two models can be compared; evaluation: what ``evaluate`` returned; speed: what ``bench_decode`` did;
    texts: what it wrote, for each prompt."""

    model: str
    label: str
    method: str | None
    bits_per_weight: float | None
    nominal_bits_per_weight: float | None
    quantized_weights: int
    bytes: dict[str, int]
    file_bytes: int
    making: Making
    vocabulary: dict[str, int] = dataclasses.field(repr=False)
    evaluation: dict[str, Any] = dataclasses.field(default_factory=dict)
    speed: dict[str, Any] | None = None
    texts: list[str] = dataclasses.field(default_factory=list)

    @property
    def is_packed(self) -> bool:
        return self.method is not None

    @property
    def perplexity(self) -> dict[str, float]:
        """By text."""
        return self.evaluation.get("perplexity", {})

    @property
    def divergence(self) -> dict[str, dict[str, float]]:
        """kl and top1_agreement by text; nothing for the original, and for what cannot be compared with it."""
        return self.evaluation.get("divergence", {})

    @property
    def tasks(self) -> dict[str, dict[str, Any]]:
        """Metrics by task."""
        return self.evaluation.get("tasks", {})

    @property
    def memory(self) -> int | None:
        """Bytes that the process grew by when it loaded and ran the model, without keys and values."""
        found = (self.speed or {}).get("memory")
        return found and found["decoded"]["resident"] - found["before"]["resident"] - found["cache"]

    def to_dict(self) -> dict[str, Any]:
        """For JSON. Layers and recipes are as ``inspect --json`` prints them."""
        fields = dataclasses.asdict(self)
        del fields["vocabulary"]
        return {**fields, "memory": self.memory}


def describe(models: Sequence[str], trust_remote_code: bool) -> list[ModelFacts]:
    """What can be known of models without running them."""
    return [_describe(model, label, trust_remote_code) for model, label in zip(models, labels_of(models), strict=True)]


def labels_of(models: Sequence[str]) -> list[str]:
    """Short names: the last part of each path or hub id, or as many parts as tell two apart."""
    parts = [[part for part in place_of(model).split("/") if part] or [model] for model in models]
    shown = [1] * len(models)
    while True:
        labels = ["/".join(part[-count:]) for part, count in zip(parts, shown, strict=True)]
        counts = Counter(labels)
        longer = [i for i, label in enumerate(labels) if counts[label] > 1 and shown[i] < len(parts[i])]
        if not longer:
            return labels
        for i in longer:
            shown[i] += 1


def place_of(model: str) -> str:
    """A hub id as it is, and the same for every way to write the same path."""
    return os.path.abspath(model) if Path(model).exists() else model.rstrip("/")


def _describe(model: str, label: str, trust_remote_code: bool) -> ModelFacts:
    path = resolve(model)
    found = accounting.inspect(model)
    if path.is_file():
        tokenizer = load_tokenizer(model, path.parent, gguf_file=path.name)
    else:
        tokenizer = load_tokenizer(model, path, trust_remote_code=trust_remote_code)
    return ModelFacts(
        model=model,
        label=label,
        method=found["method"],
        bits_per_weight=found["bits_per_weight"],
        nominal_bits_per_weight=found["nominal_bits_per_weight"],
        quantized_weights=found["quantized_weights"],
        bytes=found["bytes"],
        file_bytes=sum(file.stat().st_size for file in ([path] if path.is_file() else files_of(path))),
        making=Making() if found["method"] is None else making_of(path, found),
        vocabulary=tokenizer.get_vocab(),
    )


def measure(facts: ModelFacts, original: ModelFacts | None, measures: Measures, progress: Progress) -> None:
    """Run a model, and fill in what comes of it. What does not depend on the moment is kept, as answers to tasks are:
    a comparison that was interrupted, or has one model more, goes on from there."""
    with _store(facts, measures) as store:
        if measures.perplexity:
            facts.evaluation |= _score(facts, original, measures, store, progress)
        if measures.tasks:
            found = evaluate(
                facts.model,
                tasks=measures.tasks,
                task_data=measures.task_data,
                limit=measures.limit,
                cache=measures.cache,
                fresh=measures.fresh,
                **measures.running,
                progress=progress,
            )
            facts.evaluation |= {key: found[key] for key in ("tasks", "groups", "limit", "harness") if key in found}
        if measures.prompts:
            key = hash_of(["texts", list(measures.prompts), measures.max_tokens])
            if key not in store:
                store.put(key, _write(facts, measures))
            facts.texts = store[key]
    return_free_memory()
    if measures.speed:
        facts.speed = _time(facts.model, measures)


def _store(facts: ModelFacts, measures: Measures) -> Store:
    return open_store(
        resolve(facts.model),
        device=measures.device,
        activations=measures.activations,
        cache=measures.cache,
        fresh=measures.fresh,
        kept_for="comparison",
    )


def _score(
    facts: ModelFacts, original: ModelFacts | None, measures: Measures, store: Store, progress: Progress
) -> dict[str, Any]:
    """Perplexity, and divergence from an original that has the same vocabulary."""
    against = None
    if original is not None and original is not facts and original.vocabulary == facts.vocabulary:
        against = original.model
    kept_for = [None if against is None else content_hash(resolve(against)), measures.seqlen, measures.windows]
    key = hash_of(["texts scored", [(one, text_fingerprint(one)) for one in measures.perplexity], *kept_for])
    if key not in store:
        found = evaluate(
            facts.model,
            perplexity=measures.perplexity,
            seqlen=measures.seqlen,
            windows=measures.windows,
            against=against,
            **measures.running,
            progress=progress,
        )
        store.put(key, found)
    return dict(store[key])


def _write(facts: ModelFacts, measures: Measures) -> list[str]:
    """What the model writes after each prompt, its likeliest token at a time."""
    trust = measures.trust_remote_code
    opened, tokenizer = inference.open_model(facts.model, device=measures.device, trust_remote_code=trust)
    set_activations(opened, measures.activations)
    return [
        inference.continue_text(opened, tokenizer, prompt, max_tokens=measures.max_tokens)
        for prompt in measures.prompts
    ]


def _time(model: str, measures: Measures) -> dict[str, Any]:
    """What ``signbit bench decode`` says."""
    command = [sys.executable, "-m", "signbit", "bench", "decode", "--json", "-", "--tokens", str(_DECODED_TOKENS)]
    command += ["--activations", measures.activations]
    command += ["--trust-remote-code"] if measures.trust_remote_code else []
    found = subprocess.run(
        [*command, "--", model], capture_output=True, text=True, check=False, env=os.environ, stdin=subprocess.DEVNULL
    )
    if found.returncode == 2:
        raise SignbitError(found.stderr.strip().splitlines()[-1].removeprefix("signbit: "))
    if found.returncode != 0:
        raise RuntimeError(f"bench decode of {model} ended with status {found.returncode}: {found.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(found.stdout)
    return result
