"""The recipe's key ``tune``: how each block is tuned after its linears are quantized, and the model after its blocks.

``distill`` is a short name for a training (training/options.py) whose start is what quantizing by the rest of the
recipe makes: its scales are trained to give the original model's next-token distributions and states, its signs stay.
"""

from __future__ import annotations

import math
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from signbit.precision import Precision
from signbit.training.options import NotNegative, Positive
from signbit.training.straight_through import Estimator


class TuneOptions(BaseModel):
    """Keys below ``tune`` in a recipe, or tune.KEY on the command line."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int = Field(4, ge=1, description="passes over the calibration text, for each block")
    batch: int = Field(2, ge=1, description="calibration sequences in a step")
    signs: bool = Field(True, description="turn signs too, through latent weights; false: coefficients only")
    norms: bool = Field(False, description="tune the weights of the block's norms too, which stay in 16 bits")
    lr: Positive = Field(3e-4, description="peak learning rate of latent weights, whose mean magnitude is 0.01")
    scale_lr: Positive = Field(1e-3, description="of scales and means, relative to their size, and of norms")
    straight_through: Estimator = Field("identity", description="the gradient of a latent weight's sign")
    max_grad_norm: NotNegative = Field(0.0, description="the norm that gradients are clipped to; 0: not at all")
    precision: Precision = Field(
        "auto", description="of activations; auto: bfloat16 where the processor multiplies it. Latents are float32"
    )

    distill: int = Field(0, ge=0, description="optimizer steps of distilling the scales of the whole model at the end")
    distill_batch: int = Field(4, ge=1, description="sequences of seqlen tokens in such a step")
    distill_lr: Positive = Field(1e-3, description="peak learning rate of these steps, relative to the scales' size")

    def distillation(self) -> dict[str, Any]:
        """``distill`` as training keys."""
        return {
            "steps": self.distill,
            "batch": self.distill_batch,
            "micro_batch": math.gcd(self.distill_batch, 4),
            "signs": False,
            "lr": self.distill_lr,
            "warmup": min(10, self.distill // 6),
            "heldout": 4,
            "precision": self.precision,
        }
