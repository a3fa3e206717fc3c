"""Quantizing block by block: what feeds what, what is remembered, and what happens when it is interrupted."""

import dataclasses
import errno
import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import signbit
from signbit import Recipe, SignbitError, checkpoint, methods, pipeline
from signbit.architectures import find_blocks
from signbit.blockwise import calibrate, linears
from signbit.calibration.capture import BlockInputs
from signbit.cli import main
from signbit.journal import Journal
from signbit.precision import fast_float32
from signbit.source import Source, open_source
from tiny import SMALL_RECIPE, build

MakeDir = Callable[..., Path]


def recipe(text: Path, **keys: Any) -> Recipe:
    return Recipe({**SMALL_RECIPE, "calib": str(text), **keys})


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


def change_weight(model: Path, name: str, change: Callable[[torch.Tensor], Any]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors[name])
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


# --- what feeds what --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["keep", "int8"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "opt", "gpt_neox", "gpt2", "qwen3_moe"])
def test_quantized_blocks_feed_the_next(
    family: str, codec: str, tiny_dir: MakeDir, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states behind the last block are those of the loaded model, bit for bit."""
    recorded: list[BlockInputs] = []
    tokens: list[torch.Tensor] = []

    class Recorded(BlockInputs):
        def record(self, model: Any, batches: Any, device: Any) -> None:
            recorded.append(self)
            tokens.extend(batches)
            super().record(model, batches, device)

    monkeypatch.setattr(calibrate, "BlockInputs", Recorded)
    pipeline.quantize(str(tiny_dir(family)), tmp_path / "out", recipe(text_file, embeddings=codec), device="cpu")
    model, _ = signbit.load(tmp_path / "out")
    seen: list[torch.Tensor] = []
    last = model.get_submodule(find_blocks(build(family))[0])[-1]
    last.register_forward_hook(lambda _m, _i, y: seen.append(y[0] if isinstance(y, tuple) else y))
    with torch.no_grad(), fast_float32():
        for batch in tokens:
            model(batch, use_cache=False)
    assert sum(len(batch) for batch in tokens) == 8
    for hidden, wanted in zip(recorded[0].hidden, seen, strict=True):
        assert torch.equal(hidden, wanted)


def test_only_one_block_is_in_memory(
    tiny_dir: MakeDir, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Source] = []

    def remember(*args: Any, **options: Any) -> Source:
        opened.append(open_source(*args, **options))
        return opened[0]

    monkeypatch.setattr(pipeline, "open_source", remember)
    resident: list[set[int]] = []
    quantize = methods.METHODS["billm"].quantize

    def watch(*args: Any) -> Any:
        model = opened[0].skeleton
        held = [[*block.parameters(), *block.buffers()] for block in find_blocks(model)[1]]
        resident.append({i for i, tensors in enumerate(held) if any(t.device.type != "meta" for t in tensors)})
        assert model.get_input_embeddings().weight.device.type == "meta"
        assert model.get_output_embeddings().weight.device.type == "meta"
        return quantize(*args)

    watched = dataclasses.replace(methods.METHODS["billm"], quantize=watch)
    monkeypatch.setitem(methods.METHODS, "billm", watched)
    pipeline.quantize(str(tiny_dir("gemma3", tie=False)), tmp_path / "out", recipe(text_file), device="cpu")
    assert resident == [{block} for block in range(4) for _ in range(7)]


def test_skipped_linears_stay_and_are_reported(tiny_dir: MakeDir, text_file: Path, tmp_path: Path) -> None:
    report = signbit.quantize(
        str(tiny_dir("llama")), tmp_path / "out", recipe(text_file, skip=["*.down_proj", "model.layers.0.self_attn.*"])
    )
    names = {layer.name for layer in report.layers}
    assert len(names) == 14 - 2 - 4
    assert "model.layers.0.mlp.up_proj" in names
    why = {name: reason for name, reason in report.unquantized.items() if "left out by the recipe" in reason}
    assert len(why) == 6
    assert why["model.layers.1.mlp.down_proj.weight"] == "left out by the recipe (skip: *.down_proj)"
    stored, original = load_file(tmp_path / "out/model.safetensors"), load_file(tiny_dir("llama") / "model.safetensors")
    assert all(torch.equal(stored[name], original[name]) for name in why)
    model, _ = signbit.load(tmp_path / "out")
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, original["model.layers.1.mlp.down_proj.weight"])


def test_methods_without_data_need_no_calibration(tiny_dir: MakeDir, tmp_path: Path) -> None:
    """samples 0: no text is read, not even the default one, which would need a network."""
    report = signbit.quantize(str(tiny_dir("mixtral")), tmp_path / "out", "sign", device="cpu")
    assert all(layer.output_error is None and layer.damping is None and not layer.notes for layer in report.layers)
    assert all(layer.weight_error > 0 for layer in report.layers)
    assert signbit.inspect(tmp_path / "out")["nominal_bits_per_weight"] == 1


def test_calibrated_sign_reports_its_output_error(tiny_dir: MakeDir, text_file: Path, tmp_path: Path) -> None:
    report = signbit.quantize(str(tiny_dir("llama")), tmp_path / "out", recipe(text_file, method="sign"))
    assert all(layer.output_error for layer in report.layers)


def test_damping_is_raised_and_noted(tiny_dir: MakeDir, text_file: Path, tmp_path: Path) -> None:
    """Sixteen tokens give a Hessian of rank 16 for 72 inputs."""
    keys = recipe(text_file, samples=1, seqlen=16, damping=0.0)
    report = signbit.quantize(str(tiny_dir("llama")), tmp_path / "out", keys, device="cpu")
    for layer in report.layers:
        assert layer.damping is not None
        assert layer.damping > 0
        assert layer.notes == [f"damping raised to {layer.damping:g}"]


def test_experts_that_no_token_reaches_are_quantized_and_noted(tiny_dir: MakeDir, tmp_path: Path) -> None:
    """Equal tokens all go to the same two of four experts."""
    (tmp_path / "text.txt").write_text("~" * 100)
    keys = recipe(tmp_path / "text.txt", samples=2, seqlen=8)
    report = signbit.quantize(str(tiny_dir("mixtral")), tmp_path / "out", keys, device="cpu")
    noted = {layer.name for layer in report.layers if any("no calibration token" in note for note in layer.notes)}
    experts = {name.rpartition(".")[0] for name in noted}
    assert len(experts) == 4  # two in each of two blocks
    assert len(noted) == 8
    assert all(".mlp.experts." in name for name in noted)
    model, _ = signbit.load(tmp_path / "out")
    assert model(torch.arange(20).view(1, 20)).logits.isfinite().all()


def test_inputs_that_are_always_zero_are_noted(tiny_dir: MakeDir, text_file: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_dir("llama"), tmp_path / "model")
    change_weight(model, "model.layers.0.input_layernorm.weight", lambda w: w[:3].zero_())
    report = signbit.quantize(str(model), tmp_path / "out", recipe(text_file), device="cpu")
    notes = {layer.name: layer.notes for layer in report.layers}
    for name in ("q_proj", "k_proj", "v_proj"):
        assert notes[f"model.layers.0.self_attn.{name}"] == ["3 inputs are always zero"]
    assert notes["model.layers.0.self_attn.o_proj"] == []


# --- determinism ------------------------------------------------------------------------------------------------------


def test_weights_that_only_dead_inputs_reach_are_no_underflow(
    tiny_dir: MakeDir, text_file: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_dir("gpt2"), tmp_path / "model")
    for part in ("weight", "bias"):
        change_weight(tmp_path / "model", f"transformer.h.0.ln_1.{part}", lambda tensor: tensor.zero_())
    report = pipeline.quantize(str(tmp_path / "model"), tmp_path / "out", recipe(text_file), device="cpu")
    assert any("always zero" in note for layer in report.layers for note in layer.notes)


def test_a_group_wider_than_the_row_is_noted(tiny_dir: MakeDir, text_file: Path, tmp_path: Path) -> None:
    report = pipeline.quantize(
        str(tiny_dir("llama")), tmp_path / "out", recipe(text_file, group_size=50_000), device="cpu"
    )
    for layer in report.layers:
        assert layer.notes == [f"a row of {layer.shape[1]} columns is one group: group_size is 50000"]


@pytest.mark.parametrize("calib", ["file", "self"])
def test_a_seed_determines_every_byte(calib: str, tiny_dir: MakeDir, text_file: Path, tmp_path: Path) -> None:
    found = []
    for number, seed in enumerate([0, 0, 1]):
        torch.manual_seed(number)  # the global generator has no say
        keys = recipe(text_file, seed=seed, **({"calib": "self"} if calib == "self" else {}))
        signbit.quantize(str(tiny_dir("qwen3")), tmp_path / str(number), keys, device="cpu")
        found.append(contents(tmp_path / str(number)))
    assert found[0] == found[1]
    assert found[0]["model.safetensors"] != found[2]["model.safetensors"]


def test_nothing_is_left_behind(
    tiny_dir: MakeDir, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    signbit.quantize(str(tiny_dir("llama")), tmp_path / "out", recipe(text_file), device="cpu")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "tmp"}
    assert not list((tmp_path / "tmp").iterdir())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_signbit.py",
        "report.html",
        "signbit_report.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


# --- interruption -----------------------------------------------------------------------------------------------------

OPTIONS = ["--set", "group_size=32", "--samples", "8", "--seqlen", "48", "--device", "cpu"]


def command(model: Path, out: Path, text: Path, *more: str) -> list[str]:
    return ["quantize", str(model), "--out", str(out), "--calib", str(text), *OPTIONS, *more]


def environment() -> dict[str, str]:
    """As many threads as here, so that sums are added up in the same order."""
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}


@pytest.fixture(scope="module")
def undisturbed(tiny_dir: MakeDir, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert main(command(tiny_dir("gemma3"), out, text_file)) == 0
    return contents(out)


@pytest.mark.parametrize("moment", ["tokens.safetensors", "block-00001.safetensors", "checkpoint"])
def test_killed_runs_are_resumed(
    moment: str, undisturbed: dict[str, bytes], tiny_dir: MakeDir, text_file: Path, tmp_path: Path
) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    arguments = command(tiny_dir("gemma3"), out, text_file)
    run = subprocess.Popen(
        [sys.executable, "-m", "signbit", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    while not (partial / moment).exists():
        assert run.poll() is None, run.communicate()[1].decode()
        time.sleep(0.001)
    run.kill()
    run.communicate()
    assert run.returncode == -signal.SIGKILL
    assert not out.exists()
    assert main([*arguments, "--resume"]) == 0
    assert contents(out) == undisturbed
    assert not partial.exists()


# One process is killed at exact moments; since importing takes seconds, each victim is a fork of one that has imported.
_VICTIMS = """
import os, shutil, signal, sys
from pathlib import Path
import signbit, signbit.checkpoint, signbit.journal, signbit.safetensors_file
from signbit.cli import main

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def die_in_write(name):  # in the midst of writing a file
    def write(self, written, tensors, metadata=None):
        if written == name:
            Path(self.directory / f".{name}.safetensors.{os.getpid()}.tmp").write_bytes(b"half")
            die()
        return original(self, written, tensors, metadata)
    original = signbit.journal.Journal.write
    signbit.journal.Journal.write = write

def die_after_rename():
    discard = signbit.journal.Journal.discard
    def late(self):
        return die() if self.has("tokens") else discard(self)
    signbit.journal.Journal.discard = late

def die_in_discard():  # with half of the journal gone
    unlink = Path.unlink
    def halfway(path, *a, **k):
        unlink(path, *a, **k)
        if path.name == "block-00002.safetensors":
            die()
    Path.unlink = halfway

MOMENTS = {
    "first file": lambda: die_in_write("outer-embeddings"),
    "calibration": lambda: die_in_write("tokens"),
    "first block": lambda: die_in_write("block-00000"),
    "last block": lambda: die_in_write("block-00003"),
    "weights": lambda: setattr(signbit.checkpoint, "copy_tensors", die),
    "before renaming": lambda: setattr(signbit.checkpoint, "publish", die),
    "after renaming": die_after_rename,
    "cleaning up": die_in_discard,
}
for moment, out in zip(MOMENTS, sys.argv[1].split(",")):
    child = os.fork()
    if not child:
        MOMENTS[moment]()
        main(sys.argv[2:] + ["--out", out])
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, moment
"""


def test_killed_at_exact_moments(
    undisturbed: dict[str, bytes], tiny_dir: MakeDir, text_file: Path, tmp_path: Path
) -> None:
    outs = [tmp_path / str(number) for number in range(8)]
    arguments = ["quantize", str(tiny_dir("gemma3")), "--calib", str(text_file), *OPTIONS]
    subprocess.run(
        [sys.executable, "-c", _VICTIMS, ",".join(map(str, outs)), *arguments],
        check=True,
        stderr=subprocess.DEVNULL,
        env=environment() | {"OMP_NUM_THREADS": "1"},  # forking does not go with threads
        timeout=120,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for out in outs:
            assert main([*arguments, "--out", str(out), "--resume"]) == 0
            assert contents(out) == undisturbed, out
            assert not out.with_name(f"{out.name}.partial").exists()
    finally:
        torch.set_num_threads(threads)


class StoppedError(Exception):
    pass


@pytest.fixture
def stopped(
    tiny_dir: MakeDir, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Path, Path]]:
    """(model, out) of a run that ended after its first block."""
    write_block = Journal.write_block

    def stop(self: Journal, index: int, block: Any) -> None:
        write_block(self, index, block)
        raise StoppedError

    monkeypatch.setattr(Journal, "write_block", stop)
    with pytest.raises(StoppedError):
        signbit.quantize(str(tiny_dir("llama")), tmp_path / "out", recipe(text_file), device="cpu")
    monkeypatch.undo()
    yield tiny_dir("llama"), tmp_path / "out"


def test_finished_blocks_are_not_quantized_again(
    stopped: tuple[Path, Path], text_file: Path, monkeypatch: pytest.MonkeyPatch, packed_dir: MakeDir
) -> None:
    written: list[int] = []
    write_block = Journal.write_block

    def note(self: Journal, index: int, block: Any) -> None:
        written.append(index)
        write_block(self, index, block)

    monkeypatch.setattr(Journal, "write_block", note)
    model, out = stopped
    signbit.quantize(str(model), out, recipe(text_file), device="cpu", resume=True)
    assert written == [1]
    assert contents(out) == contents(packed_dir("llama"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 1}, r"with seed=0 \(not 1\)"),
        ({"group_size": 64}, r"with group_size=32 \(not 64\)"),
        ({"method": "xnor"}, r"with method=billm \(not xnor\)"),
    ],
)
def test_resuming_with_other_options_is_refused(
    changed: dict[str, Any], message: str, stopped: tuple[Path, Path], text_file: Path
) -> None:
    model, out = stopped
    with pytest.raises(SignbitError, match=f"was begun {message}.*--overwrite"):
        signbit.quantize(str(model), out, recipe(text_file, **changed), device="cpu", resume=True)
    # Nothing is lost: the right command still goes on.
    signbit.quantize(str(model), out, recipe(text_file), device="cpu", resume=True)


def test_resuming_with_another_model_is_refused(stopped: tuple[Path, Path], text_file: Path, tmp_path: Path) -> None:
    model, out = stopped
    other = shutil.copytree(model, tmp_path / "other")
    change_weight(other, "model.layers.1.mlp.up_proj.weight", lambda w: w[0, 0].add_(1))
    with pytest.raises(SignbitError, match=r"was begun from another model.*--overwrite"):
        signbit.quantize(str(other), out, recipe(text_file), device="cpu", resume=True)


def test_resuming_with_a_text_that_changed_is_refused(stopped: tuple[Path, Path], text_file: Path) -> None:
    model, out = stopped
    text = text_file.read_text(encoding="utf-8")
    text_file.write_text("other " * 4000, encoding="utf-8")
    try:
        with pytest.raises(SignbitError, match="was begun with text="):
            signbit.quantize(str(model), out, recipe(text_file), device="cpu", resume=True)
    finally:
        text_file.write_text(text, encoding="utf-8")


def test_foreign_files_are_never_touched(tiny_dir: MakeDir, text_file: Path, tmp_path: Path) -> None:
    """Neither where the journal would be, nor inside the model that is read, nor in an output that is no checkpoint."""
    thesis = tmp_path / "out.partial" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("x")
    with pytest.raises(SignbitError, match="holds something else"):
        signbit.quantize(tiny_dir("llama"), tmp_path / "out", recipe(text_file), overwrite=True)
    assert thesis.read_text() == "x"
    model = shutil.copytree(tiny_dir("llama"), tmp_path / "there" / "original")
    before = contents(model)
    with pytest.raises(SignbitError, match="the model lies in"):
        signbit.quantize(model, tmp_path / "there", recipe(text_file), overwrite=True)
    assert contents(model) == before


def test_weights_are_freed_as_soon_as_they_are_packed(
    tiny_dir: MakeDir, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without waiting for the garbage collector, which does not know how large what it leaves is."""
    weights: list[weakref.ref[torch.Tensor]] = []
    alive_at_most = 0

    def watching(linear: torch.nn.Module, weight: torch.Tensor) -> torch.Tensor:
        nonlocal alive_at_most
        weights.append(weakref.ref(weight))
        alive_at_most = max(alive_at_most, sum(reference() is not None for reference in weights))
        return weight

    monkeypatch.setattr(linears, "dense_weight", watching)
    gc.disable()
    try:
        signbit.quantize(tiny_dir("llama"), tmp_path / "out", recipe(text_file), device="cpu")
    finally:
        gc.enable()
    assert len(weights) == 14
    assert alive_at_most <= torch.get_num_threads()  # one in each thread


def test_two_runs_on_one_output_exclude_each_other(tiny_dir: MakeDir, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Journal(out).locked(), pytest.raises(SignbitError, match="another run is writing"):
        signbit.quantize(tiny_dir("llama"), out, recipe(text_file))
    assert not out.exists()


def test_scales_too_small_for_their_dtype_are_refused(tiny_dir: MakeDir, text_file: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_dir("llama"), tmp_path / "model")
    file = model / "model.safetensors"
    tensors = load_file(file)
    save_file({k: v * 1e-9 if "proj" in k else v for k, v in tensors.items()}, file, {"format": "pt"})
    with pytest.raises(SignbitError, match=r"_proj: scales are too small.*bfloat16"):
        signbit.quantize(model, tmp_path / "out", recipe(text_file))
    signbit.quantize(model, tmp_path / "out", recipe(text_file, scale_dtype="bfloat16"))


def test_a_skip_pattern_that_matches_nothing_is_refused(tiny_dir: MakeDir, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(SignbitError, match=r"matches no linear layer, such as model\.layers\.0"):
        signbit.quantize(tiny_dir("llama"), tmp_path / "out", recipe(text_file, skip="*.qproj"))


def test_a_damaged_journal_is_refused(stopped: tuple[Path, Path], text_file: Path) -> None:
    model, out = stopped
    (out.with_name("out.partial") / "journal.json").write_text("{")
    with pytest.raises(SignbitError, match=r"journal\.json is damaged.*--overwrite"):
        signbit.quantize(str(model), out, recipe(text_file), device="cpu", resume=True)


def test_an_interrupted_run_is_neither_forgotten_nor_in_the_way(stopped: tuple[Path, Path], text_file: Path) -> None:
    model, out = stopped
    with pytest.raises(SignbitError, match=r"out\.partial holds an interrupted run.*--resume.*--overwrite"):
        signbit.quantize(str(model), out, recipe(text_file), device="cpu")
    signbit.quantize(str(model), out, recipe(text_file, seed=3), device="cpu", overwrite=True)
    assert signbit.inspect(out)["recipe"]["seed"] == 3
    assert not out.with_name("out.partial").exists()


def test_resuming_what_is_finished_does_nothing(
    tiny_dir: MakeDir, packed_dir: MakeDir, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(packed_dir("llama"), tmp_path / "out")
    monkeypatch.setattr(Journal, "write", None)
    report = signbit.quantize(str(tiny_dir("llama")), out, recipe(text_file), device="cpu", resume=True)
    assert len(report.layers) == 14
    assert contents(out) == contents(packed_dir("llama"))
    with pytest.raises(SignbitError, match=r"is a finished checkpoint made with seed=0 \(not 1\)"):
        signbit.quantize(str(tiny_dir("llama")), out, recipe(text_file, seed=1), device="cpu", resume=True)
    with pytest.raises(SignbitError, match="is a finished checkpoint made from another model"):
        signbit.quantize(str(tiny_dir("qwen2")), out, recipe(text_file), device="cpu", resume=True)


def test_resuming_what_was_never_begun_begins(
    tiny_dir: MakeDir, packed_dir: MakeDir, text_file: Path, tmp_path: Path
) -> None:
    """A run that is killed before it wrote anything can be resumed with the same command too."""
    signbit.quantize(str(tiny_dir("llama")), tmp_path / "out", recipe(text_file), device="cpu", resume=True)
    assert contents(tmp_path / "out") == contents(packed_dir("llama"))


# --- what is in the way -----------------------------------------------------------------------------------------------


def test_existing_output_is_refused(tiny_dir: MakeDir, packed_dir: MakeDir, text_file: Path, tmp_path: Path) -> None:
    out = shutil.copytree(packed_dir("llama"), tmp_path / "out")
    with pytest.raises(SignbitError, match=r"out already exists.*--overwrite"):
        signbit.quantize(str(tiny_dir("llama")), out, recipe(text_file, seed=1))
    assert contents(out) == contents(packed_dir("llama"))
    assert not out.with_name("out.partial").exists()


def test_overwriting_replaces_a_checkpoint(
    tiny_dir: MakeDir, packed_dir: MakeDir, text_file: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(packed_dir("mixtral"), tmp_path / "out")
    signbit.quantize(str(tiny_dir("llama")), out, recipe(text_file), device="cpu", overwrite=True)
    assert contents(out) == contents(packed_dir("llama"))


def test_overwriting_replaces_checkpoints_only(tiny_dir: MakeDir, text_file: Path, tmp_path: Path) -> None:
    original = shutil.copytree(tiny_dir("llama"), tmp_path / "original")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "thesis.txt").write_text("three years")
    file = tmp_path / "file"
    file.write_text("precious")
    before = contents(original)
    for out in (original, folder, file):
        with pytest.raises(SignbitError, match="is not a signbit checkpoint: it is not overwritten"):
            signbit.quantize(str(tiny_dir("llama")), out, recipe(text_file), overwrite=True)
    assert contents(original) == before
    assert (folder / "thesis.txt").read_text() == "three years"
    assert file.read_text() == "precious"


def stop(*_: Any, **__: Any) -> None:
    raise StoppedError


def test_the_old_checkpoint_stays_until_the_new_one_is_whole(
    tiny_dir: MakeDir, packed_dir: MakeDir, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(packed_dir("mixtral"), tmp_path / "out")
    monkeypatch.setattr(checkpoint, "publish", stop)
    with pytest.raises(StoppedError):
        signbit.quantize(str(tiny_dir("llama")), out, recipe(text_file), device="cpu", overwrite=True)
    assert contents(out) == contents(packed_dir("mixtral"))
    monkeypatch.undo()
    # The same command with --resume goes on with the new one, and replaces the old one.
    assert main(command(tiny_dir("llama"), out, text_file, "--overwrite", "--resume")) == 0
    assert contents(out) == contents(packed_dir("llama"))


def test_stopped_while_the_old_checkpoint_is_deleted(
    tiny_dir: MakeDir, packed_dir: MakeDir, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(packed_dir("mixtral"), tmp_path / "out")
    rmtree = shutil.rmtree

    def halfway(path: Path, **options: Any) -> None:
        if (Path(path) / "modeling_signbit.py").exists() and Path(path).name != "checkpoint":
            (Path(path) / "config.json").unlink()
            raise StoppedError
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", halfway)
    with pytest.raises(StoppedError):
        signbit.quantize(str(tiny_dir("llama")), out, recipe(text_file), device="cpu", overwrite=True)
    monkeypatch.undo()
    assert main(command(tiny_dir("llama"), out, text_file, "--overwrite", "--resume")) == 0
    assert contents(out) == contents(packed_dir("llama"))


def test_output_without_a_parent_is_refused(tiny_dir: MakeDir, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(SignbitError, match="nowhere does not exist: create it first"):
        signbit.quantize(str(tiny_dir("llama")), tmp_path / "nowhere" / "out", recipe(text_file))


# --- disk full --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["outer-embeddings", "tokens", "block-00001"])
def test_disk_full(
    name: str,
    tiny_dir: MakeDir,
    packed_dir: MakeDir,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write = Journal.write

    def full(self: Journal, written: str, *args: Any) -> None:
        if written == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, written, *args)

    monkeypatch.setattr(Journal, "write", full)
    arguments = command(tiny_dir("llama"), tmp_path / "out", text_file)
    assert main(arguments) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("signbit: ")
    assert "No space left on device" in last
    assert "--resume" in last
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert main([*arguments, "--resume"]) == 0
    assert contents(tmp_path / "out") == contents(packed_dir("llama"))


@pytest.mark.parametrize("limit", [100, 20_000, 150_000])
def test_writes_that_really_fail(
    limit: int,
    tiny_dir: MakeDir,
    packed_dir: MakeDir,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Files may have so many bytes only: the manifest fails, or a tensor file, or the checkpoint's weights."""
    arguments = command(tiny_dir("llama"), tmp_path / "out", text_file)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        status = main(arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err
    assert status == 2, error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--resume"]) == 0
    assert contents(tmp_path / "out") == contents(packed_dir("llama"))


# --- numbers that are none --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_weights_that_are_no_numbers(
    name: str, value: float, tiny_dir: MakeDir, text_file: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_dir("llama"), tmp_path / "model")
    change_weight(model, name, lambda w: w.view(-1)[7].fill_(value))
    with pytest.raises(SignbitError, match=f"{name} of .* contains NaN or infinite weights"):
        signbit.quantize(str(model), tmp_path / "out", recipe(text_file), device="cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("large", "named"), [("mlp.up_proj", "mlp.down_proj"), ("self_attn.v_proj", "self_attn.o_proj")]
)
def test_activations_that_are_no_numbers(
    large: str, named: str, tiny_dir: MakeDir, text_file: Path, tmp_path: Path
) -> None:
    """Weights that are finite, with outputs whose squares are not."""
    model = shutil.copytree(tiny_dir("llama"), tmp_path / "model")
    change_weight(model, f"model.layers.1.{large}.weight", lambda w: w.mul_(1e30))
    with pytest.raises(SignbitError, match=rf"input of model\.layers\.1\.{named} contains NaN or infinite values"):
        signbit.quantize(str(model), tmp_path / "out", recipe(text_file, scale_dtype="bfloat16"), device="cpu")


def test_scales_that_float16_cannot_hold(tiny_dir: MakeDir, text_file: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_dir("llama"), tmp_path / "model")
    change_weight(model, "model.layers.1.mlp.up_proj.weight", lambda w: w.mul_(1e6))
    with pytest.raises(SignbitError, match=r"model\.layers\.1\.mlp\.up_proj.*bfloat16"):
        signbit.quantize(str(model), tmp_path / "out", recipe(text_file), device="cpu")
    signbit.quantize(
        str(model), tmp_path / "out", recipe(text_file, scale_dtype="bfloat16"), device="cpu", overwrite=True
    )


# --- what is known before any work is done ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "keys", "message"),
    [
        ("llama", {"seqlen": 257}, "seqlen 257 is beyond the model's 256 positions"),
        ("qwen3", {"head": "int8"}, "head is tied to its embeddings"),
        ("llama", {"skip": ["*"]}, "skip leaves no linear layer"),
        ("llama", {"samples": 10**6}, "too few for 1000000 samples"),
    ],
)
def test_refused_before_anything_is_written(
    family: str, keys: dict[str, Any], message: str, tiny_dir: MakeDir, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(SignbitError, match=message):
        signbit.quantize(str(tiny_dir(family)), tmp_path / "out", recipe(text_file, **keys))
    assert not list(tmp_path.iterdir())


def test_report_is_that_of_the_checkpoint(tiny_dir: MakeDir, text_file: Path, tmp_path: Path) -> None:
    report = signbit.quantize(str(tiny_dir("llama")), tmp_path / "out", recipe(text_file), device="cpu")
    kept = json.loads((tmp_path / "out" / "signbit_report.json").read_text())
    assert [dataclasses.asdict(layer) for layer in report.layers] == kept["layers"]
    assert report.unquantized == kept["unquantized"]
    assert {"forward", "Hessians", "factorization", "search", "sweep", "packing"} <= report.seconds.keys()
    assert "seconds" not in kept
