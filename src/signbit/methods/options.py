"""What all methods' options have in common, and what a method is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from signbit.calibration.hessian import Factor
from signbit.layouts.base import SCALE_DTYPES, Layout

Feedback = Literal["none", "diagonal", "block", "column"]


class MethodOptions(BaseModel):
    """Options that every method has. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    group_size: int = Field(128, ge=0, description="columns that share scales; 0: the whole row")
    mean: bool = Field(True, description="subtract and store a mean for every scale")
    scale_dtype: Literal["float16", "bfloat16"] = Field("float16", description="storage of scales and means")

    def groups_of(self, columns: int) -> int:
        """``group_size`` for a matrix with this many columns, normalised: a group of the whole row is 0."""
        return 0 if self.group_size >= columns else self.group_size

    def notes(self, columns: int) -> list[str]:
        """What a matrix with this many columns cannot have of these options, for the report."""
        if self.group_size <= columns:
            return []
        return [f"a row of {columns} columns is one group: group_size is {self.group_size}"]

    @property
    def storage(self) -> Any:
        return SCALE_DTYPES[self.scale_dtype]


class SweepOptions(MethodOptions):
    """Options of the methods that sweep over columns with error feedback (sweep.py, descent.py)."""

    feedback: Feedback = Field("diagonal", description="how the sweep passes a group's error on")
    refits: int = Field(0, ge=0, le=100, description="rounds of least squares on a group's coefficients in the sweep")
    passes: int = Field(0, ge=0, le=100, description="rounds of coordinate descent over the matrix after the sweep")

    @model_validator(mode="after")
    def _refits_need_feedback(self) -> Self:
        if self.refits and self.feedback == "none":
            raise ValueError("refits need feedback, which is none")
        return self


@dataclass(frozen=True)
class LinearSurvey:
    """One linear of the original model: weight float32 [out, in]; hessian: H [in, in] of the calibration tokens that
    reach it in the original model, the identity if none does; None if inputs were not asked for."""

    weight: Tensor
    hessian: Tensor | None

    @property
    def power(self) -> Tensor | None:
        """2 / N sum x_j^2 [in] over the N tokens."""
        return None if self.hessian is None else self.hessian.diagonal()


class Survey(Protocol):
    """A look at all that is to be quantized, one block in memory at a time; ``inputs`` cost a forward pass."""

    def __call__(self, *, inputs: bool) -> Iterator[dict[str, LinearSurvey]]: ...


@dataclass(frozen=True)
class Method:
    """An algorithm from a paper: decides on a layout for one weight matrix.

    ``quantize(weight [out, in] float32, factor, options)`` is a pure function. ``factor`` is None only when there was
    no calibration, which only methods with ``calibrated=False`` accept. ``allocate(survey, options)`` is asked once,
    before the first block, for the options of each block; None: the same for all.
    """

    name: str
    summary: str
    paper: str
    layout: type[Layout]
    options: type[MethodOptions]
    calibrated: bool
    quantize: Callable[[Tensor, Factor | None, Any], Layout]
    allocate: Callable[[Survey, Any], list[Any] | None] = lambda survey, options: None
