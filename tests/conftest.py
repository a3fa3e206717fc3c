"""Fixtures shared by all tests."""

import os

# Before any import of huggingface_hub, which reads it once; the processes that tests start inherit it.
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import signbit
from tiny import SMALL_RECIPE, TEXT, save_tiny


@pytest.fixture(scope="session", autouse=True)
def quiet() -> None:
    # By call and not by environment: the command line is tested with the verbosity its users get.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # the workers share the cores


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_dir(family, **options of save_tiny)`: a saved tiny model, made once. Copy it before changing it."""
    made: dict[tuple[Any, ...], Path] = {}

    def directory(family: str, **options: Any) -> Path:
        key = (family, *sorted(options.items()))
        if key not in made:
            made[key] = save_tiny(family, tmp_path_factory.mktemp(family) / "model", **options)
        return made[key]

    return directory


@pytest.fixture(scope="session")
def packed_dir(
    tiny_dir: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`packed_dir(family, source={options of save_tiny}, **keys of the recipe)`: a checkpoint made with BiLLM, once."""
    made: dict[str, Path] = {}

    def directory(family: str, source: dict[str, Any] | None = None, **keys: Any) -> Path:
        name = repr((family, source, keys))
        if name not in made:
            made[name] = tmp_path_factory.mktemp(f"{family}-packed") / "checkpoint"
            recipe = {**SMALL_RECIPE, "calib": str(text_file), **keys}
            signbit.quantize(str(tiny_dir(family, **(source or {}))), made[name], signbit.Recipe(recipe), device="cpu")
        return made[name]

    return directory


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few kB of plain English."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path
