"""The keys of a recipe that say how it is trained; a recipe with any of them is one for ``signbit train``."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from signbit.precision import Precision

# Nothing sensible is beyond, and float32 sums of what is below do not overflow at once.
_LARGEST = 1e6

Positive = Annotated[float, Field(gt=0, le=_LARGEST, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, le=_LARGEST, allow_inf_nan=False)]
# The weight that AdamW gives what it has seen, step by step: with 1 it would never see anything else.
Decay = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]


class TrainingOptions(BaseModel):
    """Options of the training that follows a method; flat in the recipe beside the method's own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # How long, from where, on what
    start: str | None = Field(
        None, description="a checkpoint to start from; by default what the method makes of the model"
    )
    steps: int = Field(1000, ge=1, description="optimizer steps")
    batch: int = Field(8, ge=1, description="sequences of seqlen tokens in a step, over all processes")
    micro_batch: int = Field(4, ge=1, description="sequences that go through the model at once, in each process")
    heldout: int = Field(8, ge=0, description="sequences kept back from the text, for the perplexity while training")

    self_tokens: int = Field(
        1_000_000, ge=1, description="calib: self: tokens that the model writes, at most as many as the steps need"
    )

    # What is learned
    signs: bool = Field(True, description="turn signs, through latent weights; false: scales and means only")
    latent: Literal["constant", "weights", "margins"] = Field(
        "constant",
        description="magnitudes of the latent weights at the start: all alike, as the original weights', or as what "
        "turning a sign would cost",
    )
    latent_scale: Positive = Field(0.01, description="the latent weights' mean magnitude at the start")
    straight_through: Literal["identity", "tanh", "clip"] = Field(
        "tanh", description="the gradient of a latent weight w's sign: 1, 1.001 - tanh(w)^2, or |w| <= 1"
    )
    scales: Literal["learned", "optimal", "fixed"] = Field(
        "learned",
        description="scales: trained, the best for the latent weights in each step, or fixed; "
        "means and bias corrections are trained unless fixed",
    )
    freeze_salient: bool = Field(True, description="salient weights stay as they are at the start")

    # The loss, each term a mean per token
    kl: NotNegative = Field(1.0, description="weight of KL(teacher || student) of the next token's distribution")
    hidden: NotNegative = Field(
        1.0, description="weight of the squared distance of unit hidden states, summed over blocks"
    )
    lm: NotNegative = Field(0.0, description="weight of the text's own cross entropy")
    teacher_cache: bool = Field(False, description="keep the teacher's states on disk, for text that is seen often")

    # The optimizer: AdamW
    lr: Positive = Field(1e-4, description="peak learning rate of latent weights")
    scale_lr: Positive | None = Field(None, description="of scales and means; by default lr")
    betas: tuple[Decay, Decay] = Field((0.9, 0.98), description="of AdamW")
    weight_decay: NotNegative = Field(0.0, description="of latent weights, as a fraction of the learning rate")
    warmup: int = Field(0, ge=0, description="steps of linear warm-up")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="of the learning rate after the warm-up")
    max_grad_norm: NotNegative = Field(1.0, description="the norm that gradients are clipped to; 0: not at all")

    # How it runs
    precision: Precision = Field(
        "auto", description="of activations; auto: bfloat16 where the processor multiplies it. Latents are float32"
    )
    gradient_checkpointing: bool = Field(False, description="compute blocks again rather than keep their activations")
    sharding: Literal["none", "full"] = Field(
        "none", description="with several processes: each has the whole model (DDP), or a shard of it (FSDP2)"
    )
    snapshot_every: int = Field(100, ge=1, description="steps between snapshots that --resume goes on from")
    evaluate_every: int = Field(100, ge=1, description="steps between held-out perplexities")

    @model_validator(mode="after")
    def _something_is_trained(self) -> Self:
        if not self.signs and self.scales != "learned":
            raise ValueError(f"signs: false leaves scales to be trained, but scales are {self.scales}: set learned")
        return self
