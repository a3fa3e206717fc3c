"""The recipe's key ``budget``: how one option of the method differs from linear to linear under one total."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Total = Annotated[float, Field(gt=0, le=64, allow_inf_nan=False)]


class BudgetOptions(BaseModel):
    """Keys below ``budget`` in a recipe, or budget.KEY on the command line."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: Total = Field(description="most bits a weight, of all that is stored for the linears, on average over them")
    vary: str = Field("bits", description="the option of the method that differs from linear to linear")
    values: tuple[Any, ...] = Field(min_length=2, description="what it may be")
    samples: int = Field(8, ge=1, description="calibration sequences that the linears' sensitivities are measured on")
    probe: dict[str, Any] = Field({}, description="options changed while values are tried, such as fewer iterations")

    @model_validator(mode="after")
    def _vary_is_not_probed(self) -> Self:
        if self.vary in self.probe:
            raise ValueError(
                f"budget.probe changes {self.vary}, which values are tried for: take it out of one of them"
            )
        return self
