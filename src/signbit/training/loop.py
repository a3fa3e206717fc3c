"""The loop: windows go through teacher and student, losses come back, AdamW takes a step, now and then a snapshot.

Everything that a step does follows from its number, the snapshot before it and the recipe: which windows it sees, its
learning rate, in what order sums are taken. So a run that goes on after a stop gives the same losses, on CPUs to the
last digit (for the same number of threads), and n processes give what one does up to the rounding of sums.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from signbit.errors import SignbitError
from signbit.precision import autocast, fast_float32
from signbit.processes import Processes, together
from signbit.progress import Progress
from signbit.training.data import Windows
from signbit.training.losses import cross_entropies, distillation
from signbit.training.options import TrainingOptions
from signbit.training.record import Record
from signbit.training.snapshot import Snapshot, write_snapshot
from signbit.training.spread import accumulating, drop_unused, local, spread_model, whole
from signbit.training.states import Head, States, StatesOf
from signbit.training.teacher import Teacher

# Called with the name of a figure, its value and the step.
Log = Callable[[str, float, int], None]


@dataclass
class Trainable:
    """A student ready to be trained. parameters: all that is, by name; of these, ``scales`` have their own rate."""

    states: StatesOf
    head: Head
    parameters: dict[str, nn.Parameter]
    scales: set[str]
    # How large entries of parameters may be, by name.
    limits: dict[str, float]


class Loop:
    """One training. ``run`` is all of it; the rest are its parts."""

    def __init__(
        self,
        student: Trainable,
        teacher: Teacher | None,
        windows: Windows,
        options: TrainingOptions,
        processes: Processes,
        directory: Path,
        progress: Progress,
        log: Log | None = None,
    ) -> None:
        self.options, self.processes, self.windows, self.teacher = options, processes, windows, teacher
        self.directory, self.progress, self.log = directory, progress, log
        self.head, self.limits = student.head, student.limits
        self.autocast = autocast(options.precision, processes.device)
        self.accumulation = accumulation_of(options, processes.count)
        names = list(student.parameters)
        self.states = student.states
        self.model = spread_model(student.states, processes, options.sharding)
        # Sharding has put others in their place.
        now = dict(student.states.model.named_parameters())
        self.parameters = {name: now[name] for name in names}
        self.optimizer = self._optimizer(student.scales)
        self.record = Record()

    @together()
    def run(self, snapshot: Snapshot | None) -> Record:
        """Train, from the start or a ``snapshot`` whose parameters the student has; the last snapshot is of the end."""
        if snapshot is not None:
            self.record = snapshot.record
            snapshot.restore_optimizer(self.optimizer, self.parameters)
            snapshot.close()  # the next one takes its place on disk
        options, tokens = self.options, self.options.batch * self.windows.seqlen
        if not self.record.heldout:
            self._evaluate()
            self._stop_if_in_trouble(self.record.trouble())
        with self.progress.task("training", options.steps) as task, fast_float32():
            task.advance(self.record.steps)
            for step in range(self.record.steps, options.steps):
                began = time.perf_counter()
                self._step(step)
                self._stop_if_in_trouble(self.record.trouble())
                done = step + 1
                if done % options.evaluate_every == 0 or done == options.steps:
                    self._evaluate()
                    self._stop_if_in_trouble(self.record.trouble())
                if done % options.snapshot_every == 0 or done == options.steps:
                    # The loss was that of the weights before the step; these are to replace a good snapshot.
                    self._stop_if_in_trouble(self._misfit())
                    write_snapshot(self.directory, self.parameters, self.optimizer, self.record, self.processes)
                speed = tokens / (time.perf_counter() - began)
                task.status(self._status(speed))
                task.advance()
        return self.record

    # A step ---------------------------------------------------------------------------------------------------------

    def _step(self, step: int) -> None:
        self._set_rates(step)
        self.optimizer.zero_grad(set_to_none=True)
        numbers = self.windows.of_step(step, self.options.batch)[self.processes.rank :: self.processes.count]
        sums: dict[str, Tensor] = {}
        for part in range(self.accumulation):
            own = numbers[part * self.options.micro_batch : (part + 1) * self.options.micro_batch]
            with accumulating(self.model, part == self.accumulation - 1):
                for name, value in self._backward(own).items():
                    sums[name] = sums.get(name, 0) + value / self.accumulation
        drop_unused(list(self.parameters.values()), self.states, self.processes, self.options.sharding)
        trained = [parameter for parameter in self.parameters.values() if parameter.grad is not None]
        norm = nn.utils.clip_grad_norm_(trained, self.options.max_grad_norm or math.inf)
        means = self.processes.mean(torch.stack(list(sums.values()))).tolist()
        self.record.losses.append({**dict(zip(sums, means, strict=True)), "gradient": float(whole(norm))})
        if math.isfinite(self.record.losses[-1]["loss"]) and math.isfinite(self.record.losses[-1]["gradient"]):
            self.optimizer.step()
        for term, figure in self.record.losses[-1].items():
            self._log(term, figure)

    def _backward(self, numbers: list[int]) -> dict[str, Tensor]:
        ids = self.windows.ids(numbers).to(self.processes.device)
        wanted = States() if self.teacher is None else self.teacher.states(numbers, ids)
        with self.autocast:
            found = States(*self.model(ids))
            head = None if self.teacher is None else self.teacher.head
            losses = distillation(self.options, found, wanted, ids, self.head, head)
        (losses.total / self.accumulation).backward()
        return {"loss": losses.total.detach(), **losses.terms}

    def _optimizer(self, scales: set[str]) -> torch.optim.Optimizer:
        """Decay pulls latent weights towards a change of sign; scales would only shrink."""
        options = self.options
        groups = [
            {
                "params": [p for name, p in self.parameters.items() if (name in scales) == of_scales],
                "weight_decay": 0.0 if of_scales else options.weight_decay,
                "peak": (options.scale_lr or options.lr) if of_scales else options.lr,
            }
            for of_scales in (False, True)
        ]
        # fused: one pass over memory; lr as a number, since it is set before every step.
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=options.lr, betas=options.betas, fused=True)

    def _set_rates(self, step: int) -> None:
        share = rate(step, self.options)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * share

    def _misfit(self) -> str | None:
        """The first parameter, by name, that has an entry that is not finite or too large to be packed; in all
        processes the same one."""
        outside = [
            _exceeds(local(parameter.detach()), self.limits[name]) for name, parameter in self.parameters.items()
        ]
        anywhere = self.processes.mean(torch.stack(outside).float()).tolist()
        for name, share in zip(self.parameters, anywhere, strict=True):
            if share:
                return f"{name} has entries that are NaN or too large to be stored: it diverges"
        return None

    def _stop_if_in_trouble(self, trouble: str | None) -> None:
        if trouble is None:
            return
        if not self.record.steps:
            raise SignbitError(f"{trouble} before the first step: give another start or another text")
        kept = (self.record.steps - 1) // self.options.snapshot_every * self.options.snapshot_every
        how = (
            f"the snapshot of step {kept} is kept: write it out with --export DIR and train on from it with --set "
            "start=DIR and a lower lr"
            if kept
            else "there is no snapshot yet: start again with a lower lr, more warmup or a smaller max_grad_norm"
        )
        raise SignbitError(f"step {self.record.steps}: {trouble}; {how}")

    # How it goes ----------------------------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        """Perplexity of the held-out windows, each process doing its share of them."""
        heldout, count, rank = self.windows.heldout, self.processes.count, self.processes.rank
        if not heldout:
            return
        losses = []
        for first in range(0, len(heldout), count):
            # Where there is none left, one is done again and not counted: sharded models run together.
            ids = self.windows.ids([heldout[min(first + rank, len(heldout) - 1)]]).to(self.processes.device)
            with torch.no_grad(), self.autocast:
                losses.append(cross_entropies(self.model(ids)[1], ids, self.head)[0])
        every = self.processes.gather(torch.stack(losses)).T.flatten()[: len(heldout)]
        mean = float(every.mean())
        perplexity = math.exp(min(mean, 700.0)) if math.isfinite(mean) else mean
        self.record.heldout.append((self.record.steps, perplexity))
        self.progress.note(f"step {self.record.steps}: held-out perplexity {perplexity:,.4g}")
        self._log("heldout perplexity", perplexity)

    def _status(self, speed: float) -> str:
        loss = self.record.losses[-1]["loss"]
        return f"loss {loss:.4g}, {speed:,.0f} tokens/s"

    def _log(self, name: str, value: float) -> None:
        if self.log is not None:
            self.log(name, value, self.record.steps)


def _exceeds(values: Tensor, limit: float) -> Tensor:
    """Whether any of the values, perhaps none, is NaN or of a magnitude above ``limit``; on their device."""
    if not values.numel():
        return torch.zeros((), dtype=torch.bool, device=values.device)
    low, high = torch.aminmax(values)
    # NaN is not within anything.
    return ~((low >= -limit) & (high <= limit))


def rate(step: int, options: TrainingOptions) -> float:
    """The learning rate of a step, counted from 0, as a share of its peak."""
    if step < options.warmup:
        return (step + 1) / options.warmup
    if options.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - options.warmup) / max(1, options.steps - options.warmup)))


def accumulation_of(options: TrainingOptions, processes: int) -> int:
    """Backward passes in a step, in each process."""
    together = options.micro_batch * processes
    if options.batch % together:
        raise SignbitError(
            f"batch {options.batch} is no multiple of {together}, which is micro_batch {options.micro_batch} in "
            f"{processes} process{'es' if processes > 1 else ''}: change one of them"
        )
    return options.batch // together
