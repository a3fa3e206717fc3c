"""Training from the model to the checkpoint: what is trained, stopped, resumed, written out, and refused."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

import signbit
from launching import launch, process_of
from signbit import Recipe, SignbitError, checkpoint
from signbit.cli import main
from signbit.journal import Journal
from signbit.processes import LEFT_ALONE
from signbit.training import loop, student
from signbit.training.arguments import from_start
from signbit.training.run import Trained
from stored import unpadded
from tiny import CONFIGS, save_tiny

MakeDir = Callable[..., Path]
Capture = pytest.CaptureFixture[str]
# A few steps, with everything on: two kinds of scales, all three losses, accumulation, two epochs and a bit.
SMALL: dict[str, Any] = {
    "method": "onebit",
    "norm": False,
    "samples": 0,
    "seqlen": 32,
    "steps": 12,
    "batch": 4,
    "micro_batch": 2,
    "heldout": 3,
    "lr": 1e-3,
    "warmup": 2,
    "lm": 0.1,
    "weight_decay": 0.01,
    "snapshot_every": 5,
    "evaluate_every": 6,
    "precision": "float32",
}


def recipe(text: Path, **keys: Any) -> Recipe:
    return Recipe({**SMALL, "calib": str(text), **keys})


def train(model: Path, out: Path, text: Path, **keys: Any) -> Trained:
    options = {key: keys.pop(key) for key in ("resume", "overwrite") if key in keys}
    return signbit.train(model, out, recipe(text, **keys), device="cpu", **options)


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


def command(model: Path, out: Path, text: Path, **keys: Any) -> list[str]:
    fields = {**SMALL, "calib": str(text), **keys}
    del fields["method"]
    settings = [word for key, value in fields.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    file = out.with_name("recipe.yaml")
    file.write_text("method: onebit\n")
    return ["train", str(model), "--out", str(out), "--recipe", str(file), "--device", "cpu", *settings]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    program = [sys.executable, "-m", "signbit", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(program, text=True, stderr=subprocess.PIPE, env=environment)


@pytest.fixture(scope="module")
def trained(tiny_dir: MakeDir, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, Path]:
    """An undisturbed run on one thread, as those in processes of their own are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        out = tmp_path_factory.mktemp("trained") / "out"
        return train(tiny_dir("llama"), out, text_file), out
    finally:
        torch.set_num_threads(threads)


# --- what works -------------------------------------------------------------------------------------------------------


def test_the_loss_falls(tiny_dir: MakeDir, text_file: Path, tmp_path: Path) -> None:
    found = train(tiny_dir("llama"), tmp_path / "out", text_file, steps=40, lr=1e-4, scale_lr=1e-2, lm=0.0).record
    first, last = (sum(step["loss"] for step in part) for part in (found.losses[:5], found.losses[-5:]))
    assert last < 0.9 * first
    assert found.steps == 40


def test_the_checkpoint_is_packed_and_says_how_it_was_made(
    trained: tuple[Trained, Path], tiny_dir: MakeDir, text_file: Path
) -> None:
    result, out = trained
    found = signbit.inspect(out)
    assert found["method"] == "onebit"
    assert found["recipe"] == recipe(text_file).to_dict()
    assert Recipe(found["recipe"]).training == recipe(text_file).training
    assert found["quantized_weights"] == sum(layer.shape[0] * layer.shape[1] for layer in result.report.layers)
    assert all(layer["output_error"] is None and layer["weight_error"] > 0 for layer in found["layers"])
    stored = load_file(out / "model.safetensors")
    linears = {layer["name"] for layer in found["layers"]}
    assert not [name for name in stored if name.removesuffix(".weight") in linears]
    assert all(tensor.dtype != torch.float32 for name, tensor in stored.items() if ".packed." in name)
    kept = json.loads((out / "signbit_training.json").read_text())
    assert len(kept["losses"]) == 12
    assert [step for step, _ in kept["heldout"]] == [0, 6, 12]
    assert kept["losses"][0].keys() == {"loss", "kl", "lm", "hidden", "gradient"}
    assert not out.with_name("out.partial").exists()


def test_what_is_trained_is_what_is_packed(trained: tuple[Trained, Path], tiny_dir: MakeDir, text_file: Path) -> None:
    """The packed model's perplexity on the held-out windows is the training graph's."""
    result, out = trained
    model, tokenizer = signbit.load(out)
    tokens = torch.tensor(tokenizer(text_file.read_text())["input_ids"])
    count = min(len(tokens), (12 * 4 + 3) * 32) // 32
    cut = tokens[: count * 32].view(count, 32)
    heldout = cut[[(2 * i + 1) * count // 6 for i in range(3)]]
    with torch.no_grad():
        logits = model(heldout).logits[:, :-1].double()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), heldout[:, 1:].flatten())
    assert result.record.heldout[-1][1] == pytest.approx(float(loss.exp()), rel=1e-5)


def test_save_pretrained_writes_it_back(trained: tuple[Trained, Path], tmp_path: Path) -> None:
    _, out = trained
    model, _ = signbit.load(out, dtype="auto")
    model.save_pretrained(tmp_path / "again")
    again = contents(tmp_path / "again")
    assert unpadded(again["model.safetensors"]) == unpadded(contents(out)["model.safetensors"])
    assert json.loads(again["config.json"]) == json.loads(contents(out)["config.json"])


def test_pb_llm_from_a_checkpoint_with_experts(tiny_dir: MakeDir, text_file: Path, tmp_path: Path) -> None:
    """Starts from a PTQ checkpoint, biases and experts included; its salient weights stay what they are."""
    model = tiny_dir("qwen3_moe")
    ptq = {"method": "pb-llm", "group_size": 0, "samples": 8, "seqlen": 32, "calib": str(text_file)}
    signbit.quantize(model, tmp_path / "ptq", Recipe(ptq), device="cpu")
    keys = {**SMALL, **ptq, "start": str(tmp_path / "ptq"), "scales": "optimal", "steps": 3, "lr": 0.2}
    del keys["norm"]
    result = signbit.train(model, tmp_path / "out", Recipe(keys), device="cpu")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("ptq", "out"))
    assert before.keys() == after.keys()
    frozen = ("positions", "ends", "codes", "code_scales")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name.endswith(frozen))
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items() if name.endswith("signs"))
    assert len(result.report.layers) == len(signbit.inspect(tmp_path / "ptq")["layers"])
    assert signbit.inspect(tmp_path / "out")["bits_per_weight"] == signbit.inspect(tmp_path / "ptq")["bits_per_weight"]


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "opt_projected", "qwen3"])
def test_other_families(family: str, tiny_dir: MakeDir, text_file: Path, tmp_path: Path) -> None:
    """Capped logits, transposed linears, projections around the blocks, tied embeddings stored as integers."""
    keys: dict[str, Any] = {"steps": 2, "teacher_cache": True, "gradient_checkpointing": True, "heldout": 1}
    keys |= {"embeddings": "int8"} if family == "qwen3" else {}
    result = train(tiny_dir(family), tmp_path / "out", text_file, **keys)
    assert result.record.steps == 2
    signbit.load(tmp_path / "out")


def test_self_written_text(tiny_dir: MakeDir, tmp_path: Path) -> None:
    keys = {**SMALL, "calib": "self", "self_tokens": 20 * 32, "steps": 3}
    record = signbit.train(tiny_dir("llama"), tmp_path / "out", Recipe(keys), device="cpu").record
    assert record.steps == 3


def test_bfloat16_is_close(trained: tuple[Trained, Path], tiny_dir: MakeDir, text_file: Path, tmp_path: Path) -> None:
    found = train(tiny_dir("llama"), tmp_path / "out", text_file, precision="bfloat16").record
    for step, wanted in zip(found.losses, trained[0].record.losses, strict=True):
        assert step["loss"] == pytest.approx(wanted["loss"], rel=0.05)


def test_checkpointing_and_the_cache_change_nothing_much(
    trained: tuple[Trained, Path], tiny_dir: MakeDir, text_file: Path, tmp_path: Path
) -> None:
    keys = {"gradient_checkpointing": True, "teacher_cache": True, "micro_batch": 4}
    found = train(tiny_dir("llama"), tmp_path / "out", text_file, **keys).record
    for step, wanted in zip(found.losses, trained[0].record.losses, strict=True):
        assert step["loss"] == pytest.approx(wanted["loss"], rel=2e-3)


# --- stopped and resumed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [False, True])
def test_killed_and_resumed_ends_in_the_same_bytes(
    cache: bool, trained: tuple[Trained, Path], tiny_dir: MakeDir, text_file: Path, tmp_path: Path
) -> None:
    model, out = tiny_dir("llama"), tmp_path / "out"
    arguments = command(model, out, text_file, teacher_cache=cache)
    wanted = trained[1]
    if cache:
        wanted = tmp_path / "wanted"
        assert start(command(model, wanted, text_file, teacher_cache=True)).wait(120) == 0
        arguments = command(model, out, text_file, teacher_cache=True)
    process = start(arguments)
    snapshot = out.with_name("out.partial") / "snapshot.safetensors"
    limit = time.monotonic() + 100
    while not snapshot.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < limit
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    resumed = start([*arguments, "--resume"])
    assert resumed.wait(120) == 0, resumed.communicate()[1]
    assert contents(out) == contents(wanted)


class StoppedError(Exception):
    pass


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = loop.Loop._step

    def counted(self: Any, number: int) -> None:
        if number == step:
            raise StoppedError
        original(self, number)

    monkeypatch.setattr(loop.Loop, "_step", counted)


def stop_after_seven_steps(model: Path, out: Path, text: Path, **keys: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_at(7, patch)
        with pytest.raises(StoppedError):
            train(model, out, text, **keys)


@pytest.fixture
def stopped(tiny_dir: MakeDir, text_file: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A run that was stopped after seven steps."""
    model, out = tiny_dir("llama"), tmp_path / "out"
    stop_after_seven_steps(model, out, text_file)
    return model, out


def test_export_in_mid_run(stopped: tuple[Path, Path], text_file: Path, tmp_path: Path, capsys: Capture) -> None:
    """The export is of the last snapshot, loads, trains on, and leaves the run as it was."""
    model, out = stopped
    before = contents_below(out.with_name("out.partial"))
    assert main(["train", str(model), "--out", str(out), "--export", str(tmp_path / "other")]) == 0
    assert contents_below(out.with_name("out.partial")) == before
    kept = json.loads((tmp_path / "other" / "signbit_training.json").read_text())
    assert len(kept["losses"]) == 5
    signbit.load(tmp_path / "other")
    train(model, tmp_path / "on", text_file, start=str(tmp_path / "other"), steps=1)
    with pytest.raises(SignbitError, match=r"seed=1 \(not 0\)|seed=0 \(not 1\)"):
        signbit.export_snapshot(model, out, tmp_path / "third", recipe(text_file, seed=1))
    assert main(["train", str(model), "--out", str(tmp_path / "no"), "--export", str(tmp_path / "third")]) == 2
    assert "nothing to export" in capsys.readouterr().err


def contents_below(directory: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(directory.rglob("*")) if file.is_file()}


def test_resuming_another_run_is_refused(stopped: tuple[Path, Path], text_file: Path, tmp_path: Path) -> None:
    model, out = stopped
    with pytest.raises(SignbitError, match=r"was begun with lr=0.001 \(not 0.01\)"):
        train(model, out, text_file, lr=0.01, resume=True)
    with pytest.raises(SignbitError, match="holds an interrupted run"):
        train(model, out, text_file)
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text() + "More.")
    renamed = shutil.copy(other, tmp_path / "text.txt")
    with pytest.raises(SignbitError, match="was begun with"):
        train(model, out, Path(renamed), resume=True)


def test_resuming_a_finished_run_does_nothing(
    trained: tuple[Trained, Path], tiny_dir: MakeDir, text_file: Path
) -> None:
    result, out = trained
    before = contents(out)
    again = train(tiny_dir("llama"), out, text_file, resume=True)
    assert again.record == result.record
    assert contents(out) == before
    with pytest.raises(SignbitError, match="already exists"):
        train(tiny_dir("llama"), out, text_file)


# --- what is refused --------------------------------------------------------------------------------------------------


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing to train for": ({"kl": 0, "hidden": 0, "lm": 0}, "nothing to train for"),
    "a batch that does not divide": ({"batch": 3}, r"batch 3 is no multiple of 2"),
    "all held out": ({"heldout": 5000}, r"heldout keeps 5000 back: give a longer text"),
    "sequences beyond the model's": ({"seqlen": 257}, "256 positions"),
    "a start of another method": ({"method": "sign"}, "was made by method"),
    "weights that leave no betas": ({"betas": [0.9, 1]}, "'betas.1'.*less than 1"),
    "negative betas": ({"betas": [-0.1, 0.9]}, "'betas.0'"),
    "latents beyond float32": ({"latent_scale": 1e39}, "'latent_scale'.*less than or equal"),
    **{
        f"infinite {key}": ({key: float("inf")}, f"'{key}'")
        for key in ("lr", "scale_lr", "weight_decay", "kl", "hidden", "lm", "latent_scale", "max_grad_norm")
    },
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tiny_dir: MakeDir, packed_dir: MakeDir, text_file: Path, tmp_path: Path) -> None:
    keys, words = REFUSED[case]
    fields = {**SMALL, "calib": str(text_file), **keys}
    if fields["method"] != "onebit":
        del fields["norm"]
    if case == "a start of another method":
        fields["start"] = str(packed_dir("llama"))
    with pytest.raises(SignbitError, match=words) as caught:
        signbit.train(tiny_dir("llama"), tmp_path / "out", fields, device="cpu")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_quantize_and_train_refuse_each_other_s_recipes(tiny_dir: MakeDir, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(SignbitError, match="use signbit train"):
        signbit.quantize(tiny_dir("llama"), tmp_path / "out", recipe(text_file))
    with pytest.raises(SignbitError, match="use signbit quantize"):
        signbit.train(tiny_dir("llama"), tmp_path / "out", "sign", device="cpu")


def test_nan_stops_the_run_and_keeps_the_snapshot(tiny_dir: MakeDir, text_file: Path, tmp_path: Path) -> None:
    original = loop.__dict__["distillation"]
    calls = []

    def poisoned(*arguments: Any) -> Any:
        calls.append(1)
        found = original(*arguments)
        return found if len(calls) < 14 else type(found)(found.total * float("nan"), found.terms)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "distillation", poisoned)
        with pytest.raises(SignbitError, match=r"step 7: the loss is nan; the snapshot of step 5 is kept") as caught:
            train(tiny_dir("llama"), tmp_path / "out", text_file)
    assert "--export" in str(caught.value)
    found = train(tiny_dir("llama"), tmp_path / "out", text_file, resume=True).record
    assert found.steps == 12


@pytest.mark.parametrize("keys", [{"scale_lr": 1e6}, {"scales": "optimal", "lr": 1e6}], ids=["learned", "optimal"])
def test_weights_that_cannot_be_stored_replace_no_snapshot(
    keys: dict[str, Any], tiny_dir: MakeDir, text_file: Path, tmp_path: Path
) -> None:
    """The loss of the step is finite, since it is that of the weights before."""
    keys |= {"method": "sign", "group_size": 0, "steps": 1, "heldout": 0, "max_grad_norm": 0.0, "warmup": 0, "lm": 0.0}
    fields = {**SMALL, "calib": str(text_file), **keys, "samples": 4}
    del fields["norm"]
    with pytest.raises(SignbitError, match=r"step 1: model\..* has entries that are NaN or too large to be stored"):
        signbit.train(tiny_dir("llama"), tmp_path / "out", Recipe(fields), device="cpu")
    assert not (tmp_path / "out.partial" / "snapshot.safetensors").exists()


def test_a_good_snapshot_stays_when_weights_go_bad(tiny_dir: MakeDir, text_file: Path, tmp_path: Path) -> None:
    original = loop.Loop._step

    def poisoned(self: Any, step: int) -> None:
        original(self, step)
        if step == 9:
            list(self.parameters.values())[3].data[-1] = float("nan")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Loop, "_step", poisoned)
        with pytest.raises(SignbitError, match=r"step 10: .* has entries .*; the snapshot of step 5 is kept"):
            train(tiny_dir("llama"), tmp_path / "out", text_file)
    assert train(tiny_dir("llama"), tmp_path / "out", text_file, resume=True).record.steps == 12


@pytest.mark.parametrize(("bad", "done"), [(0, 0), (6, 5)])
def test_a_held_out_perplexity_that_is_no_number_stops_the_run(
    bad: int, done: int, tiny_dir: MakeDir, text_file: Path, tmp_path: Path
) -> None:
    original = loop.Loop._evaluate

    def poisoned(self: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if self.record.steps == bad:
                patch.setattr(loop, "cross_entropies", lambda *_: torch.tensor([float("nan")]))
            original(self)

    words = "the held-out perplexity is nan" + (
        "; the snapshot of step 5 is kept" if done else " before the first step"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Loop, "_evaluate", poisoned)
        with pytest.raises(SignbitError, match=words):
            train(tiny_dir("llama"), tmp_path / "out", text_file)
    found = train(tiny_dir("llama"), tmp_path / "out", text_file, resume=True).record
    assert [step for step, _ in found.heldout] == [0, 6, 12]


def test_hidden_alone_in_a_model_of_one_block_is_refused(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {**CONFIGS["llama"]().to_dict(), "num_hidden_layers": 1}
    monkeypatch.setitem(CONFIGS, "one_block", lambda: LlamaConfig(**fields))
    save_tiny("one_block", tmp_path / "model")
    with pytest.raises(SignbitError, match=r"nothing to train for: hidden.*one block: give kl or lm"):
        train(tmp_path / "model", tmp_path / "out", text_file, kl=0, lm=0)
    assert not (tmp_path / "out.partial" / "start").exists()


# --- nothing is lost --------------------------------------------------------------------------------------------------


def test_an_export_never_empties_what_it_reads(stopped: tuple[Path, Path], tmp_path: Path, capsys: Capture) -> None:
    model, out = stopped
    partial = out.with_name("out.partial")
    before, weights = contents_below(partial), contents_below(model)
    for target in (out, out / "below", partial, partial / "start"):
        assert main(["train", str(model), "--out", str(out), "--export", str(target), "--overwrite"]) == 2
        assert "belongs to the training of" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(SignbitError, match="lies in"):
        signbit.export_snapshot(model, out, model, overwrite=True)
    assert contents_below(partial) == before
    assert contents_below(model) == weights


@pytest.mark.parametrize("given", [["--resume"], ["--tensorboard", "logs"], ["--device", "cpu"]])
def test_what_an_export_would_ignore_is_refused(given: list[str], tmp_path: Path, capsys: Capture) -> None:
    assert main(["train", "demo", "--out", str(tmp_path / "out"), "--export", str(tmp_path / "other"), *given]) == 2
    assert f"{given[0]} does not go with --export" in capsys.readouterr().err


def test_an_export_to_a_full_disk(stopped: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = stopped
    before = contents_below(out.with_name("out.partial"))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "assemble_retrained", full)
    with pytest.raises(SignbitError, match=r"other\.partial failed: No space left on device\. Make room"):
        signbit.export_snapshot(model, out, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.partial"]
    assert contents_below(out.with_name("out.partial")) == before


def test_an_export_that_the_end_of_the_run_overtakes(
    stopped: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = stopped
    original = student.pack_trained

    def overtaken(*arguments: Any) -> Any:
        Journal(out).discard()
        return original(*arguments)

    monkeypatch.setattr(student, "pack_trained", overtaken)
    with pytest.raises(SignbitError, match="the training has ended meanwhile"):
        signbit.export_snapshot(model, out, tmp_path / "other")
    assert list(tmp_path.iterdir()) == []


def test_no_snapshot_stays_open(stopped: tuple[Path, Path], text_file: Path, tmp_path: Path) -> None:
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        pytest.skip("this system does not list open files")
    model, out = stopped
    signbit.export_snapshot(model, out, tmp_path / "other")
    train(model, out, text_file, resume=True)
    opened = [os.readlink(link) for link in descriptors.iterdir() if link.is_symlink()]
    assert not [path for path in opened if Path(path).name.startswith("snapshot.safetensors")]


@pytest.mark.parametrize("name", ["tokens.bin", "text-00003.bin", "snapshot.safetensors", "start.partial/journal.json"])
def test_what_a_training_has_done_counts_as_work(name: str, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "out")
    assert not journal.has_work
    journal.start({})
    assert not journal.has_work
    (journal.directory / name).parent.mkdir(exist_ok=True)
    (journal.directory / name).touch()
    assert journal.has_work


def test_a_run_from_a_start_is_not_lost_without_a_question(
    trained: tuple[Trained, Path], tiny_dir: MakeDir, text_file: Path, tmp_path: Path
) -> None:
    model, out = tiny_dir("llama"), tmp_path / "out"
    stop_after_seven_steps(model, out, text_file, start=str(trained[1]))
    before = contents_below(out.with_name("out.partial"))
    with pytest.raises(SignbitError, match=r"out\.partial holds an interrupted run"):
        train(model, out, text_file, start=str(trained[1]))
    assert contents_below(out.with_name("out.partial")) == before


def test_output_without_a_parent_is_refused(tiny_dir: MakeDir, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(SignbitError, match="nowhere does not exist: create it first"):
        train(tiny_dir("llama"), tmp_path / "nowhere" / "out", text_file)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EDQUOT, "Disk quota exceeded"), r"writing to .*out\.partial failed.*Make room; --resume"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/a/file"),
            r"^/a/file: Permission denied\. Put that right",
        ),
    ],
)
def test_room_is_spoken_of_only_where_there_is_none(
    error: OSError,
    words: str,
    tiny_dir: MakeDir,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*_: Any) -> None:
        raise error

    monkeypatch.setattr(loop, "write_snapshot", refused)
    with pytest.raises(SignbitError, match=words):
        train(tiny_dir("llama"), tmp_path / "out", text_file)


def test_a_text_that_is_gone_is_named(stopped: tuple[Path, Path], tmp_path: Path) -> None:
    model, out = stopped
    with pytest.raises(SignbitError, match=r"moved\.txt does not exist$"):
        train(model, out, tmp_path / "moved.txt", resume=True)


# --- a start ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"norm": True}, r"was made with norm=False, the recipe has True"),
        ({"scale_dtype": "bfloat16"}, r"was made with scale_dtype=float16, the recipe has bfloat16"),
        ({"embeddings": "int8"}, r"embeddings=keep"),
        ({"skip": "*.down_proj"}, r"skip=\[\]"),
        ({"dtype": "bfloat16"}, r"dtype=auto"),
    ],
)
def test_keys_that_a_start_decides_are_not_dropped(
    keys: dict[str, Any],
    words: str,
    trained: tuple[Trained, Path],
    tiny_dir: MakeDir,
    text_file: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(SignbitError, match=words):
        train(tiny_dir("llama"), tmp_path / "out", text_file, start=str(trained[1]), **keys)
    assert list(tmp_path.iterdir()) == []


def test_keys_that_are_not_given_follow_the_start(
    trained: tuple[Trained, Path], tiny_dir: MakeDir, text_file: Path, tmp_path: Path
) -> None:
    """``norm`` is true by default; the text's own keys are not the start's. Also where calib is left to the model."""
    model, first = tiny_dir("llama"), trained[1]
    fields = {key: value for key, value in recipe(text_file).to_dict().items() if key in SMALL}
    del fields["norm"]
    fields |= {"start": str(first), "calib": str(text_file), "seqlen": 16, "seed": 3, "steps": 1}
    signbit.train(model, tmp_path / "out", Recipe(fields), device="cpu")
    found = signbit.inspect(tmp_path / "out")["recipe"]
    assert (found["norm"], found["seqlen"], found["seed"]) == (False, 16, 3)
    del fields["calib"]
    assert from_start(Recipe(fields).for_model("demo")).to_dict() == {**found, "calib": "self"}


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "full"])
@pytest.mark.parametrize("begun", [False, True], ids=["from the start", "begun by one"])
def test_two_processes(
    sharding: str, begun: bool, trained: tuple[Trained, Path], tiny_dir: MakeDir, text_file: Path, tmp_path: Path
) -> None:
    model, out = tiny_dir("llama"), tmp_path / "out"
    arguments = command(model, out, text_file, sharding=sharding)
    if begun:
        stop_after_seven_steps(model, out, text_file, sharding=sharding)
        arguments.append("--resume")
    in_two_processes(arguments)
    found = json.loads((out / "signbit_training.json").read_text())
    for step, wanted in zip(found["losses"], trained[0].record.losses, strict=True):
        assert step == pytest.approx(wanted, rel=1e-3)
    for (_, perplexity), (_, wanted_perplexity) in zip(found["heldout"], trained[0].record.heldout, strict=True):
        assert perplexity == pytest.approx(wanted_perplexity, rel=1e-3)


def in_two_processes(arguments: list[str]) -> None:
    process = launch(2, "-m", "signbit", *arguments)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_when_one_dies_the_other_stops_and_the_training_resumes(
    sharding: str, trained: tuple[Trained, Path], tiny_dir: MakeDir, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = command(tiny_dir("llama"), out, text_file, sharding=sharding, steps=2000, snapshot_every=1)
    launched = launch(2, "-m", "signbit", *arguments)
    while not (tmp_path / "out.partial" / "snapshot.safetensors").exists() and launched.poll() is None:
        time.sleep(0.01)
    os.kill(process_of(launched.pid, 1), signal.SIGKILL)
    _, errors = launched.communicate(timeout=40)
    assert launched.returncode != 0
    assert errors.count(f"signbit: {LEFT_ALONE}") == 1
    assert "internal error" not in errors
    assert main(["train", str(tiny_dir("llama")), "--out", str(out), "--export", str(tmp_path / "then")]) == 0


ALONE: dict[str, tuple[str, dict[str, Any]]] = {
    # Sequences so short that processes, and whole steps, differ in the experts that they use.
    "experts": ("mixtral", {"seqlen": 2, "batch": 2, "micro_batch": 1, "weight_decay": 1.0, "lm": 0}),
    "nothing behind the last block": ("llama", {"kl": 0, "lm": 0}),
}


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "full"])
@pytest.mark.parametrize("case", ALONE)
def test_parameters_without_gradients_in_two_processes(
    case: str, sharding: str, tiny_dir: MakeDir, text_file: Path, tmp_path: Path
) -> None:
    family, keys = ALONE[case]
    wanted = train(tiny_dir(family), tmp_path / "wanted", text_file, **keys)
    in_two_processes(command(tiny_dir(family), tmp_path / "out", text_file, sharding=sharding, **keys))
    found = json.loads((tmp_path / "out" / "signbit_training.json").read_text())
    for step, other in zip(found["losses"], wanted.record.losses, strict=True):
        assert step == pytest.approx(other, rel=1e-3)
