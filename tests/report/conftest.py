"""One comparison, made once, and a browser to look at it with."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import signbit
from browser import Browser
from hostile import HOSTILE_FOLDER, HOSTILE_NAME, HOSTILE_TEXT, Compared
from signbit import inference
from signbit.bench import bench_decode
from signbit.report import measure
from tiny import SMALL_RECIPE, TEXT


@pytest.fixture(scope="session")
def hostile_models(tiny_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """An original and three checkpoints."""
    folder = tmp_path_factory.mktemp("models")
    original = folder / HOSTILE_NAME
    shutil.copytree(tiny_dir("llama"), original)
    text = folder / HOSTILE_FOLDER / "text.txt"
    text.parent.mkdir()
    text.write_text(TEXT, encoding="utf-8")
    made = [str(original)]
    for name, keys in (
        ("billm", {}),
        ("a model with a name that is far too long for any picture", {"method": "xnor", "mean": True}),
        ("rtn & <b>co", {"method": "rtn", "bits": 4}),
    ):
        recipe = {**SMALL_RECIPE, "calib": str(text), **keys}
        signbit.quantize(str(original), folder / name, signbit.Recipe(recipe), device="cpu")
        made.append(str(folder / name))
    return made


@pytest.fixture(scope="session")
def compared(
    hostile_models: list[str], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Compared]:
    """Decoding is timed in this process, which starts faster than another, and tasks are made up."""
    folder = tmp_path_factory.mktemp("compared")

    def evaluate(model: str, *, tasks: Any = (), **options: Any) -> dict[str, Any]:
        if not tasks:
            return signbit.evaluate(model, **options)
        good = 0.9 - 0.1 * hostile_models.index(model)
        scored = {"acc": good, "acc_stderr": 0.02, "stderr": 0.02, "n": 400}
        return {"tasks": {"piqa": scored, "arc_easy": {**scored, "stderr": None}}, "harness": "0.0"}

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(measure, "evaluate", evaluate)
        patched.setattr(measure, "load_tasks", lambda *given: None)
        patched.setattr(measure, "_time", lambda model, measures: bench_decode(model, tokens=3, prompt_tokens=2))
        patched.setattr(inference, "continue_text", lambda *given, **options: HOSTILE_TEXT)
        result = signbit.compare(
            hostile_models,
            folder / "page.html",
            markdown=folder / "table (1)#?.md",
            perplexity=text_file,
            seqlen=48,
            windows=2,
            tasks=("piqa", "arc_easy"),
            prompts=[HOSTILE_TEXT],
            cache=folder / "cache",
        )
    json.dumps(result, allow_nan=False)
    yield Compared(hostile_models, folder / "page.html", folder / "table (1)#?.md", result)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened
