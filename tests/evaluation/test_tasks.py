"""Tasks: the figures are the harness's own, of the model as it is stored, and no question is asked twice."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import signbit
from published import HUB, write_benchmarks
from signbit.cli import main
from signbit.evaluation.task_data import FORMS
from signbit.layouts import Layout

pytest.importorskip("lm_eval")
MakeDir = Callable[..., Path]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Any:
    """The harness resamples in a process for each core, which takes longer to start than to do here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISABLE_MULTIPROC", "1")
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_benchmarks(tmp_path_factory.mktemp("data"))


def evaluated(model: Path, data: Path, cache: Path, **options: Any) -> dict[str, Any]:
    options = {"tasks": list(FORMS), "device": "cpu", **options}
    return signbit.evaluate(model, task_data=data, cache=cache, **options)


def harness_own(model: Path, limit: int | None = None) -> dict[str, dict[str, float]]:
    """The harness's figures for a dense model, one question at a time, on the hub's rows."""
    import lm_eval
    from datasets import Dataset, DatasetDict
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folders = ("arc", "hellaswag", "lambada", "openbookqa", "piqa", "super_glue/boolq", "winogrande")
    root = Path(lm_eval.__file__).parent / "tasks"
    manager = TaskManager(include_defaults=False, include_path=[root / folder for folder in folders])

    def online(task: str) -> dict[str, Any]:
        splits = ("train", "validation", "test")
        return {
            "task": task,
            "custom_dataset": lambda **_: DatasetDict({name: Dataset.from_list(HUB[task]) for name in splits}),
        }

    tasks = manager.load({"group": "all", "task": [online(task) for task in FORMS]})
    lm = HFLM(pretrained=AutoModelForCausalLM.from_pretrained(model), tokenizer=AutoTokenizer.from_pretrained(model))
    found = lm_eval.evaluate(lm, {"tasks": tasks["tasks"]}, limit=limit)
    return {
        task: {key.removesuffix(",none"): value for key, value in metrics.items() if key.endswith(",none")}
        for task, metrics in found["results"].items()
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for task, metrics in expected.items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                assert found[task][metric] == pytest.approx(value, rel=1e-4), (task, metric)


def dequantized(packed: Path, original: Path, out: Path) -> Path:
    """A dense copy of a checkpoint: what its packed matrices are, and all else as it is stored."""
    model, tokenizer = signbit.load(packed)
    copy = AutoModelForCausalLM.from_pretrained(original)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, Layout):
                copy.get_submodule(name.removesuffix(".packed")).weight.copy_(module.dequantize())
        for name, tensor in model.state_dict().items():
            if ".packed." not in name:
                copy.get_parameter(name).copy_(tensor)
    copy.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def test_figures_are_the_harness_own(tiny_dir: MakeDir, data: Path, tmp_path: Path) -> None:
    found = evaluated(tiny_dir("llama"), data, tmp_path)
    assert_same(found["tasks"], harness_own(tiny_dir("llama")))
    assert {task: metrics["n"] for task, metrics in found["tasks"].items()} == {t: len(HUB[t]) for t in FORMS}
    assert found["tasks"]["piqa"].keys() == {
        *("acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "stderr", "n", "version"),
    }
    assert found["tasks"]["lambada_openai"]["stderr"] == found["tasks"]["lambada_openai"]["acc_stderr"]
    assert found["perplexity"] == {}
    assert found["harness"].startswith("0.")


def test_packed_is_its_dequantized_copy(tiny_dir: MakeDir, packed_dir: MakeDir, data: Path, tmp_path: Path) -> None:
    packed = packed_dir("llama", embeddings="int8")
    found = evaluated(packed, data, tmp_path / "cache", limit=3)
    dense = dequantized(packed, tiny_dir("llama"), tmp_path / "dense")
    assert_same(found["tasks"], harness_own(dense, limit=3))
    assert found["limit"] == found["tasks"]["piqa"]["n"] == 3


def test_nothing_is_asked_twice(
    packed_dir: MakeDir, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, names = packed_dir("llama"), ["piqa", "arc_easy"]
    part = evaluated(packed, data, tmp_path, tasks=names, limit=2)
    asked = count_asked(monkeypatch)
    whole = evaluated(packed, data, tmp_path, tasks=names)
    assert len(asked) == 2 * (5 - 2) + 4 * (4 - 2)
    with monkeypatch.context() as patch:
        patch.setattr("signbit.evaluation.run.open_model", lambda *_, **__: 1 // 0)  # the model is not even opened
        assert evaluated(packed, data, tmp_path, tasks=names)["tasks"] == whole["tasks"]
        assert evaluated(packed, data, tmp_path, tasks=names, limit=2)["tasks"] == part["tasks"]
    asked.clear()
    evaluated(packed, data, tmp_path, tasks=["piqa"], limit=1, activations="int8")
    assert len(asked) == 2  # of another model, so to speak
    again = evaluated(packed, data, tmp_path, tasks=names, fresh=True)
    assert len(asked) == 2 + 10 + 16
    assert again["tasks"] == whole["tasks"]


def test_other_rows_are_other_questions(packed_dir: MakeDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_benchmarks(tmp_path / "data")
    evaluated(packed_dir("llama"), data, tmp_path, tasks=["piqa"])
    asked = count_asked(monkeypatch)
    labels = data / "piqa" / "dev-labels.lst"
    labels.write_text("1\n0\n1\n0\n1\n")
    turned = evaluated(packed_dir("llama"), data, tmp_path, tasks=["piqa"])
    assert not asked  # the same questions, other right answers
    assert turned["tasks"] == evaluated(packed_dir("llama"), data, tmp_path, tasks=["piqa"], fresh=True)["tasks"]


def count_asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    from signbit.evaluation import harness_model

    asked: list[Any] = []
    keep = harness_model._Keep.add_partial

    def counted(self: Any, kind: str, arguments: Any, answer: Any) -> None:
        asked.append(arguments)
        keep(self, kind, arguments, answer)

    monkeypatch.setattr(harness_model._Keep, "add_partial", counted)
    return asked


def test_batches_change_nothing(tiny_dir: MakeDir, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = evaluated(tiny_dir("llama"), data, tmp_path / "a")["tasks"]
    monkeypatch.setattr("signbit.evaluation.harness_model._CPU_LOGITS", 1)
    assert_same(evaluated(tiny_dir("llama"), data, tmp_path / "b")["tasks"], usual)


def test_too_little_memory_makes_batches_smaller(
    tiny_dir: MakeDir, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.models.huggingface import HFLM

    call, sizes = HFLM._model_call, []

    def limited(self: Any, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
        sizes.append(len(tokens))
        if len(tokens) > 2:
            raise torch.OutOfMemoryError("as a GPU says it")
        return call(self, tokens, **options)

    usual = evaluated(tiny_dir("llama"), data, tmp_path / "a", tasks=["arc_easy"])["tasks"]
    monkeypatch.setattr(HFLM, "_model_call", limited)
    assert_same(evaluated(tiny_dir("llama"), data, tmp_path / "b", tasks=["arc_easy"])["tasks"], usual)
    assert sizes[0] > 2 >= sizes[-1]
    monkeypatch.setattr(HFLM, "_model_call", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(signbit.SignbitError, match="memory is too small"):
        evaluated(tiny_dir("llama"), data, tmp_path / "c", tasks=["arc_easy"])


def test_perplexity_and_tasks_together(packed_dir: MakeDir, data: Path, text_file: Path, tmp_path: Path) -> None:
    packed = packed_dir("llama")
    text: dict[str, Any] = {"perplexity": text_file, "seqlen": 64, "windows": 2}
    both = evaluated(packed, data, tmp_path, tasks="piqa", **text)
    assert both["perplexity"] == signbit.evaluate(packed, device="cpu", **text)["perplexity"]
    assert both["tasks"] == evaluated(packed, data, tmp_path, tasks="piqa")["tasks"]


@pytest.mark.slow
def test_a_killed_evaluation_resumes(packed_dir: MakeDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_benchmarks(tmp_path / "data")
    file = data / "lambada" / "lambada_test.jsonl"
    rows = file.read_text()
    file.write_text(
        "".join(rows.replace("The dog", f"{number} dogs").replace("He ", f"{number} ") for number in range(99))
    )
    arguments = ["eval", packed_dir("llama"), "--tasks", "lambada_openai", "--task-data", data, "--limit", 200]
    command = [sys.executable, "-m", "signbit", *map(str, [*arguments, "--cache", tmp_path / "cache"])]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    slow = "import time, signbit.evaluation.harness_model as h, signbit.cli, sys\n"
    slow += "keep = h._Keep.add_partial\n"
    slow += "h._Keep.add_partial = lambda *a: (keep(*a), time.sleep(0.05))\n"
    slow += "sys.exit(signbit.cli.main(sys.argv[1:]))\n"
    killed = subprocess.Popen([command[0], "-c", slow, *command[3:]], stderr=subprocess.DEVNULL)
    for _ in range(600):
        if any(len(kept.read_bytes().splitlines()) > 20 for kept in (tmp_path / "cache").glob("*.jsonl")):
            break
        time.sleep(0.1)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    (kept,) = (tmp_path / "cache").glob("*.jsonl")
    before = len(kept.read_bytes().splitlines()) - 1
    assert 20 <= before < 102
    asked = count_asked(monkeypatch)
    resumed = evaluated(
        packed_dir("llama"), data, tmp_path / "cache", tasks=["lambada_openai"], limit=200, device="auto"
    )
    assert 0 < len(asked) <= 102 * 2 - before
    other = evaluated(packed_dir("llama"), data, tmp_path / "anew", tasks=["lambada_openai"], limit=200, device="auto")
    assert_same(resumed["tasks"], other["tasks"])


def test_the_command(packed_dir: MakeDir, data: Path, tmp_path: Path, capsys: Capture) -> None:
    """JSON and nothing else on stdout, and no bars of the harness."""
    arguments = ["--tasks", "piqa,lambada_openai", "--tasks", "boolq", "--task-data", data, "--cache", tmp_path]
    assert main(["eval", *map(str, [packed_dir("llama"), *arguments, "--json", "-"])]) == 0
    out, err = capsys.readouterr()
    assert list(json.loads(out)["tasks"]) == ["piqa", "lambada_openai", "boolq"]
    assert "piqa: 10/10" in err
    assert "acc_norm" in err
    for noise in ("it/s", "bootstrapping", "WARNING", "Warning", "Traceback"):
        assert noise not in err


def test_groups(packed_dir: MakeDir, data: Path, tmp_path: Path, capsys: Capture) -> None:
    found = evaluated(packed_dir("llama"), data, tmp_path, tasks=["onebit", "piqa"])
    assert found["groups"].keys() == {"onebit"}
    accuracies = [metrics["acc"] for metrics in found["tasks"].values()]
    assert found["groups"]["onebit"]["acc"] == pytest.approx(sum(accuracies) / 6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "piqa,", "--task-data", "{data}"], ["separated by commas"]),
        (["--tasks", "piqa", "--task-data", "/no/such"], ["/no/such is not a directory"]),
        (["--tasks", "piqa", "--task-data", "{empty}"], ["has no piqa/dev.jsonl"]),
        (["--tasks", "billm,mmlu", "--task-data", "{data}"], ["mmlu cannot be read from --task-data", "piqa"]),
        (["--tasks", "piqa", "--task-data", "{data}", "--limit", "0"], ["limit must be at least 1"]),
        (["--tasks", "piqa", "--task-data", "{data}", "--cache", "{file}"], ["--cache"]),
        (["--tasks", "piqa"], ["piqa could not be loaded", "--task-data"]),
    ],
)
def test_bad_input(
    arguments: list[str], words: list[str], packed_dir: MakeDir, data: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    places = {"{data}": data, "{empty}": tmp_path / "empty", "{file}": tmp_path / "file"}
    given = [str(places.get(argument, argument)) for argument in arguments]
    if "--cache" not in given:
        given += ["--cache", str(tmp_path / "cache")]
    assert main(["eval", str(packed_dir("llama")), *given]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("signbit: ")
    assert err.count("\n") == 1
    assert all(word in err for word in words), err


@pytest.mark.slow
def test_unknown_tasks(packed_dir: MakeDir, tmp_path: Path) -> None:
    """All of the harness's configurations are read to say so."""
    with pytest.raises(signbit.SignbitError, match=r"has no task 'picqa': is it .*piqa"):
        signbit.evaluate(packed_dir("llama"), tasks=["picqa"], cache=tmp_path)


def test_without_the_harness(packed_dir: MakeDir, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(signbit.SignbitError, match=r"pip install 'signbit\[eval\]'"):
        evaluated(packed_dir("llama"), data, tmp_path)


def test_outputs_that_are_no_numbers_are_refused(tiny_dir: MakeDir, data: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_dir("llama"))
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_dir("llama")).save_pretrained(tmp_path / "model")
    with pytest.raises(signbit.SignbitError, match="NaN or infinite"):
        evaluated(tmp_path / "model", data, tmp_path / "cache", tasks=["piqa"])
