"""Recipes: everything that determines a run, in one flat YAML mapping.

A recipe names a method and sets that method's options beside the common keys, and, if what the method decides on is to
be trained, the training's; unknown keys are refused with the nearest valid one. Presets, named after the papers, are
the YAML files in signbit/recipes. The recipe is kept in every checkpoint's config.json, so each says how to make it
again.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from signbit.budget.options import BudgetOptions
from signbit.errors import SignbitError
from signbit.methods import METHODS, Method, MethodOptions
from signbit.training.options import TrainingOptions
from signbit.tuning.options import TuneOptions

Options = TypeVar("Options", bound=BaseModel)
RowCodec = Literal["keep", "int8", "int4"]


def _as_tuple(value: Any) -> Any:
    """One pattern may be given without a list around it."""
    return (value,) if isinstance(value, str) else value


class CommonOptions(BaseModel):
    """The keys of a recipe that do not depend on its method."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    calib: str | None = Field(
        None,
        description="calibration text: wikitext2, c4, ptb, a .txt/.raw/.jsonl file, or self; "
        "by default c4, and self for the demo model",
    )
    samples: int = Field(128, ge=0, description="calibration sequences; 0: none, for methods that need no data")
    seqlen: int = Field(2048, ge=2, description="tokens in a calibration sequence")
    seed: int = Field(0, ge=0, lt=2**63, description="of everything random")
    damping: float = Field(0.01, ge=0, le=10, description="added to the Hessian, as a fraction of its mean diagonal")
    bias_correction: bool = Field(False, description="store what each linear's outputs are off by on average")
    skip: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = Field(
        (), description="shell patterns of modules to leave unquantized, as '*.down_proj'"
    )
    embeddings: RowCodec = Field("keep", description="input embeddings: as they are, or integers with a scale a row")
    head: RowCodec = Field("keep", description="output head; a head tied to the embeddings is stored as they are")
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = Field(
        "auto", description="storage of what is not quantized; auto: as in the original"
    )
    budget: BudgetOptions | None = Field(
        None, description="one total of bits, shared out over the linears by what each makes of it; keys: see budgets"
    )
    tune: TuneOptions | None = Field(
        None, description="tune each block to give the original block's output; keys: see tuning"
    )


class Recipe:
    """A validated recipe: ``common`` options, a ``method`` and the ``options`` of that method.

    ``training`` is None in a recipe without any training key: that is one for ``quantize``, others are for ``train``.
    ``given`` are the keys that it was made from; all others have their defaults.
    """

    def __init__(self, fields: dict[str, Any]) -> None:
        fields = _nested(fields)
        self.given: frozenset[str] = frozenset(fields)
        name = fields.pop("method", None)
        if not isinstance(name, str) or name not in METHODS:
            raise SignbitError(f"unknown method {name!r}{_nearest(name if isinstance(name, str) else '', METHODS)}")
        self.method: Method = METHODS[name]
        options = self.method.options
        common = {key: fields.pop(key) for key in list(fields) if key in CommonOptions.model_fields}
        training = {key: fields.pop(key) for key in list(fields) if key in TrainingOptions.model_fields}
        for key in fields:
            if key not in options.model_fields:
                known = ["method", *CommonOptions.model_fields, *options.model_fields, *TrainingOptions.model_fields]
                raise SignbitError(f"unknown recipe key {key!r} for method {name}{_nearest(str(key), known)}")
        self.common: CommonOptions = _validate(CommonOptions, common)
        self.options: MethodOptions = _validate(options, fields)
        self.training: TrainingOptions | None = _validate(TrainingOptions, training) if training else None
        if self.method.calibrated and self.common.samples == 0:
            raise SignbitError(f"method {name} needs calibration: samples must be at least 1")
        if self.training is not None and self.common.tune is not None and self.common.tune.distill:
            raise SignbitError(
                "tune.distill is a training of its own: take it out, or the training keys, such as steps"
            )
        for key in ("bias_correction", "budget", "tune"):
            if getattr(self.common, key) and self.common.samples == 0:
                raise SignbitError(f"{key} needs calibration: samples must be at least 1")

    @classmethod
    def load(cls, name_or_file: str, overrides: dict[str, Any] | None = None) -> Recipe:
        """A preset by name, or a YAML file; ``overrides`` replace its keys."""
        return cls({**_read(name_or_file), **(overrides or {})})

    def for_model(self, model: str) -> Recipe:
        """This recipe with its calibration source settled: papers calibrate on C4, the demo must work offline."""
        if self.common.calib is not None:
            return self
        fields = {key: value for key, value in self.to_dict().items() if key in self.given}
        return Recipe({**fields, "calib": "self" if model == "demo" else "c4"})

    def to_dict(self) -> dict[str, Any]:
        """The recipe in full, defaults included, as plain JSON types."""
        fields = {**self.options.model_dump(mode="json"), **self.common.model_dump(mode="json")}
        training = self.training.model_dump(mode="json") if self.training else {}
        return {"method": self.method.name, **training, **fields}

    def without_training(self) -> Recipe:
        """What ``quantize`` is to make of it: where the training starts."""
        fields = {**self.options.model_dump(mode="json"), **self.common.model_dump(mode="json")}
        return Recipe({"method": self.method.name, **fields})

    def distilling(self) -> Recipe | None:
        """What ``train`` is to make of ``tune.distill``; None if there is nothing to distill."""
        tune = self.common.tune
        if tune is None or not tune.distill:
            return None
        fields = self.to_dict()
        fields["tune"] = {**fields["tune"], "distill": 0}
        # Text that the model itself writes costs as much as training on it does: as much again as to calibrate on.
        written = self.common.samples * self.common.seqlen
        return Recipe({**fields, **tune.distillation(), "self_tokens": written})


def presets() -> list[str]:
    """Names of the presets that come with signbit."""
    return sorted(file.name.removesuffix(".yaml") for file in _preset_files())


def parse_overrides(pairs: Iterable[str]) -> dict[str, Any]:
    """``key=value`` strings, each value read as YAML."""
    overrides = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise SignbitError(f"--set {pair!r}: expected key=value")
        try:
            overrides[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise SignbitError(f"--set {pair!r}: the value is not valid YAML, quote it") from error
    return overrides


def _preset_files() -> list[Any]:
    folder = resources.files("signbit") / "recipes"
    return [file for file in folder.iterdir() if file.name.endswith(".yaml")]


def _read(name_or_file: str) -> dict[str, Any]:
    for file in _preset_files():
        if file.name == f"{name_or_file}.yaml":
            fields: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
            return fields
    path = Path(name_or_file).expanduser()
    if not path.is_file():
        raise SignbitError(f"no recipe or file {name_or_file!r}{_nearest(name_or_file, presets())}")
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise SignbitError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(fields, dict) or not all(isinstance(key, str) for key in fields):
        raise SignbitError(f"{path} is not a mapping of recipe keys to values")
    return fields


def _nested(fields: dict[str, Any]) -> dict[str, Any]:
    """Keys such as tune.epochs as entries of the mapping below tune."""
    nested = {key: value for key, value in fields.items() if "." not in key}
    for key, value in fields.items():
        outer, dot, inner = key.partition(".")
        if dot:
            below = nested.get(outer)
            nested[outer] = {**(below if isinstance(below, dict) else {}), inner: value}
    return nested


def _nearest(name: str, known: Iterable[str]) -> str:
    """How an error about an unknown name ends."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f": did you mean {close[0]!r}?" if close else f": known are {', '.join(known)}"


def _validate(model: type[Options], fields: dict[str, Any]) -> Options:
    try:
        return model(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if not key:  # options that do not go together
            raise SignbitError(f"recipe: {first['msg'].removeprefix('Value error, ')}") from error
        raise SignbitError(f"recipe key {key!r}: {first['msg'].lower()}, got {first['input']!r}") from error
