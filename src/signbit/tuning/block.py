"""Block reconstruction: tune a quantized block to give the original block's output.

A method decides on each linear by itself, to keep that linear's output. Errors of one linear then pass through the
others and, block after block, add up. Reconstruction (BRECQ, arXiv 2102.05426; for signs DBF, 2505.11076, and
NanoQuant, 2602.06694) looks at the block as a whole:

    minimise over signs, scales, means     1/T sum_t  |f(x'_t) - y_t|^2 / |y_t|^2         y = the original model's state

x' is what the quantized blocks before make of the text and y what the *original* block makes of what the *original*
blocks made of it: so a block also puts right, as far as it can, what those before have lost.

Each token counts relative to its own size. A few tokens (the first one, as a rule) have states a thousand times as
large as all others; without the division the sum is about them alone, while the norm before the next linears divides
them by their size as well.

Signs are turned through latent weights with a straight-through derivative, as in training; where a method put a weight
(zones, ranks, salient columns) stays. A latent weight starts as far from zero as turning its sign would cost
(training/magnitudes.py), so that a few dozen steps turn the signs that hardly matter to their own weight and leave the
others. The optimizer is Adam with a cosine to zero. What is kept is what is better by the loss over all of the text,
measured with the packed matrices: tuning never makes a block worse on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from signbit.architectures import replace_module
from signbit.errors import SignbitError
from signbit.modules import QuantizedLinear
from signbit.precision import autocast, fast_float32
from signbit.processes import Processes
from signbit.training.latent import LatentLinear, latent_of
from signbit.training.options import TrainingOptions
from signbit.tuning.options import TuneOptions

# Calls the block on batch number i's hidden states, with gradients if they are wanted.
Forward = Callable[[int, Tensor], Tensor]

_TINY = 1e-12


@dataclass(frozen=True)
class Step:
    """One batch, as far as this process has it: at: where its part is among this process's, None if it has none;
    share: how much of the batch that is."""

    at: int | None
    share: float


class BlockTuner:
    """Tunes one block whose linears ``packed`` are :class:`QuantizedLinear`; leaves it with the better matrices.

    inputs, targets: one [batch, sequence, width] tensor for each batch of which this process has any. steps: all
    batches. weights: the original ones, float32, by the name of a linear in the block. storage: the dtype that norms
    are stored in. processes: who works on each batch together; their gradients add up to the whole batch's.
    """

    def __init__(
        self,
        block: nn.Module,
        forward: Forward,
        inputs: list[Tensor],
        targets: list[Tensor],
        steps: list[Step],
        weights: dict[str, Tensor],
        options: TuneOptions,
        storage: torch.dtype,
        processes: Processes,
    ) -> None:
        self.block, self.forward, self.options, self.storage = block, forward, options, storage
        self.weights = weights
        self.inputs, self.targets, self.steps, self.processes = inputs, targets, steps, processes
        self.autocast = autocast(options.precision, processes.device)
        self.linears = {name: one for name, one in block.named_modules() if isinstance(one, QuantizedLinear)}

    def tune(self, seed: int) -> tuple[float, float]:
        """Tune the block; its error before and after. seed: of the order of batches."""
        before = self._loss()
        norms = self._norms() if self.options.norms else {}
        old_norms = {name: parameter.detach().clone() for name, parameter in norms.items()}
        latents = {name: self._latent(linear, self.weights[name]) for name, linear in self.linears.items()}
        for name, latent in latents.items():
            replace_module(self.block, name, latent)
        with torch.enable_grad(), fast_float32():
            self._descend(latents, list(norms.values()), seed)
        for parameter in norms.values():
            parameter.requires_grad_(False).copy_(parameter.to(self.storage))
        after = self._put_packed(latents)
        if not after < before:  # nan is not, either
            self._put(self.linears)
            for name, parameter in norms.items():
                parameter.copy_(old_norms[name])
            return before, before
        return before, after

    def _put_packed(self, latents: dict[str, LatentLinear]) -> float:
        """Pack what was trained; the block's error with it, infinite if it cannot be stored."""
        try:
            packed = {name: QuantizedLinear(latent.pack(), self.linears[name].bias) for name, latent in latents.items()}
        except SignbitError:
            return math.inf
        self._put(packed)
        return self._loss()

    def _put(self, linears: dict[str, QuantizedLinear]) -> None:
        for name, linear in linears.items():
            replace_module(self.block, name, linear)

    def _latent(self, linear: QuantizedLinear, weight: Tensor) -> LatentLinear:
        own = self.options
        options = TrainingOptions(latent="margins", signs=own.signs, straight_through=own.straight_through)
        return latent_of(linear.packed, weight, linear.bias, options)

    def _norms(self) -> dict[str, nn.Parameter]:
        """Vectors of the block that are no linear's bias."""
        inside = tuple(f"{name}." for name in self.linears)
        return {
            name: parameter
            for name, parameter in self.block.named_parameters()
            if parameter.dim() == 1 and not name.startswith(inside)
        }

    def _descend(self, latents: dict[str, LatentLinear], norms: list[nn.Parameter], seed: int) -> None:
        options = self.options
        signs = [p for latent in latents.values() for p in latent.latents()]
        scales = [p for latent in latents.values() for p in latent.scales() if p.requires_grad]
        others = scales + [norm.requires_grad_() for norm in norms]
        groups = [{"params": signs, "peak": options.lr}, {"params": others, "peak": options.scale_lr}]
        optimizer = torch.optim.Adam([group for group in groups if group["params"]], lr=options.lr, fused=True)
        order = torch.Generator().manual_seed(seed)
        steps, step = options.epochs * len(self.steps), 0
        for _ in range(options.epochs):
            for i in torch.randperm(len(self.steps), generator=order).tolist():
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * 0.5 * (1 + math.cos(math.pi * step / steps))
                optimizer.zero_grad()
                at = self.steps[i].at
                if at is not None:
                    with self.autocast:
                        found = self.forward(at, self.inputs[at])
                    (relative_error(found, self.targets[at]) * self.steps[i].share).backward()
                self.processes.add_gradients([*signs, *others])
                if options.max_grad_norm:
                    nn.utils.clip_grad_norm_([*signs, *others], options.max_grad_norm)
                optimizer.step()
                step += 1

    @torch.no_grad()
    def _loss(self) -> float:
        """The mean over all batches."""
        total = sum(float(self._error(step.at)) * step.share for step in self.steps if step.at is not None)
        whole = torch.tensor(total, dtype=torch.float64, device=self.processes.device)
        self.processes.add(whole)
        return float(whole) / len(self.steps)

    def _error(self, at: int) -> Tensor:
        return relative_error(self.forward(at, self.inputs[at]), self.targets[at])


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean over tokens of |found - wanted|^2 / |wanted|^2, for states [..., width]."""
    wanted = wanted.float()
    size = wanted.square().sum(-1).clamp(min=_TINY)
    return ((found.float() - wanted).square().sum(-1) / size).mean()
