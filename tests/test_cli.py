"""The command line: what goes where, and one clear line for whatever is wrong with the input."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import signbit
from signbit.cli import main
from tiny import SPECIAL_IDS, tokenizer

MakeDir = Callable[..., Path]
Capture = pytest.CaptureFixture[str]
OPTIONS = ["--set", "group_size=32", "--samples", "8", "--seqlen", "48", "--device", "cpu"]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "signbit", *map(str, arguments)]
    return subprocess.run(program, capture_output=True, text=True, timeout=120, check=False)


def call(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


# --- what works -------------------------------------------------------------------------------------------------------


def test_version_and_nothing_else() -> None:
    found = run("--version")
    assert (found.returncode, found.stdout) == (0, f"signbit, version {signbit.__version__}\n")
    assert not found.stderr  # importing says nothing either


def test_quantize(tiny_dir: MakeDir, packed_dir: MakeDir, text_file: Path, tmp_path: Path) -> None:
    """As a user runs it: nothing on stdout, what was done and what not on stderr."""
    out = tmp_path / "out"
    found = run("quantize", tiny_dir("llama"), "--out", out, "--calib", text_file, *OPTIONS, "--recipe", "billm")
    assert found.returncode == 0, found.stderr
    assert not found.stdout
    for words in ("quantizing blocks: 2/2", "up_proj", "output head", "bits per weight", "forward", "masks"):
        assert words in found.stderr
    for noise in ("Warning", "warn", "meta device", "Traceback", "\x1b"):
        assert noise not in found.stderr
    assert load_file(out / "model.safetensors").keys() == load_file(packed_dir("llama") / "model.safetensors").keys()


def test_quantize_options_reach_the_recipe(tiny_dir: MakeDir, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("method: xnor\ngroup_size: 64\nsamples: 3\n")
    more = ["--set", "group_size=32", "--set", "skip=['*.v_proj']", "--seed", "5", "--seqlen", "40"]
    text = ["--calib", str(text_file)]
    assert (
        call("quantize", tiny_dir("llama"), "--out", tmp_path / "out", "--recipe", tmp_path / "mine.yaml", *more, *text)
        == 0
    )
    recipe = signbit.inspect(tmp_path / "out")["recipe"]
    wanted = {"method": "xnor", "group_size": 32, "samples": 3, "seqlen": 40, "seed": 5, "skip": ["*.v_proj"]}
    assert recipe | wanted | {"calib": str(text_file)} == recipe


def test_eval_prints_json_only(packed_dir: MakeDir, tiny_dir: MakeDir, text_file: Path) -> None:
    packed = packed_dir("llama")
    arguments = ["--perplexity", text_file, "--seqlen", "64", "--windows", "3", "--against", tiny_dir("llama")]
    found = run("eval", packed, *arguments, "--json", "-")
    assert found.returncode == 0, found.stderr
    result = json.loads(found.stdout)
    assert result["model"] == str(packed)
    assert result["tokens"] == {str(text_file): 192}
    assert result["perplexity"][str(text_file)] > 1
    assert result["divergence"][str(text_file)].keys() == {"kl", "top1_agreement"}
    assert result["seqlen"] == 64
    assert result["seconds"] > 0
    assert result["tasks"] == {}
    assert "perplexity on" in found.stderr


def test_inspect_prints_json_only(packed_dir: MakeDir, capsys: Capture) -> None:
    packed = packed_dir("llama", embeddings="int8")
    assert call("inspect", packed, "--json", "-") == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result == signbit.inspect(packed) | {"model": str(packed)}
    assert {"bits_per_weight", "nominal_bits_per_weight", "quantized_weights", "items", "method"} <= result.keys()
    assert {"quantized", "embeddings", "other", "total"} <= result["bytes"].keys()
    assert {"name", "shape", "layout", "bits_per_weight"} <= result["layers"][0].keys()
    assert f"{result['bits_per_weight']:.4f}" in err
    assert "model.layers.1.mlp.up_proj" in err


def test_inspect_writes_json_to_a_file(packed_dir: MakeDir, tmp_path: Path, capsys: Capture) -> None:
    assert call("inspect", packed_dir("llama"), "--json", tmp_path / "found.json") == 0
    assert json.loads((tmp_path / "found.json").read_text())["method"] == "billm"
    assert not capsys.readouterr().out


def test_inspect_of_an_original(tiny_dir: MakeDir, capsys: Capture) -> None:
    assert call("inspect", tiny_dir("gpt2"), "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["bits_per_weight"] is None


def test_generate_prints_the_new_text(packed_dir: MakeDir, capsys: Capture) -> None:
    packed = packed_dir("qwen3")
    assert call("generate", packed, "The old ferryman", "--max-tokens", "5") == 0
    out, err = capsys.readouterr()
    model, words = signbit.load(packed)
    ids = words("The old ferryman", return_tensors="pt").input_ids
    written = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=2)[0, ids.shape[1] :]
    assert out == words.decode(written, skip_special_tokens=True) + "\n"
    assert not err


def test_generate_samples_by_seed(packed_dir: MakeDir, capsys: Capture) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        arguments = ["--max-tokens", "20", "--temperature", "1.5", "--seed", seed]
        assert call("generate", packed_dir("qwen3"), "The old ferryman", *arguments) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_methods(capsys: Capture) -> None:
    assert call("methods", "--json", "-") == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    methods = {method["name"]: method for method in result["methods"]}
    assert {"sign", "xnor", "billm"} <= methods.keys()
    assert methods["billm"]["layout"] == "split_planes"
    assert "2402.04291" in methods["billm"]["paper"]
    assert methods["billm"]["options"]["group_size"]["default"] == 128
    assert all(option["description"] for method in methods.values() for option in method["options"].values())
    assert set(result["presets"]) >= {"billm", "sign", "xnor"}
    assert all(word in err for word in ("billm", "group_size=128", "seqlen=2048"))


def test_help_lists_the_commands(capsys: Capture) -> None:
    assert call("--help") == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("quantize", "eval", "inspect", "generate", "methods"))


def test_without_a_command_the_help_is_shown(capsys: Capture) -> None:
    assert call() in (0, 2)  # the versions of click differ
    lines = "".join(capsys.readouterr()).splitlines()
    assert any(line.split()[:1] == ["quantize"] for line in lines)


# --- what does not ----------------------------------------------------------------------------------------------------


def configure(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


def poison(model: Path, name: str, value: float) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors[name].view(-1)[3] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def bert(model: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=300, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2
    )
    replace(model, transformers.BertForMaskedLM(config))


def t5(model: Path) -> None:
    config = transformers.T5Config(
        vocab_size=300, d_model=32, d_kv=16, d_ff=40, num_layers=2, num_heads=2, **SPECIAL_IDS, decoder_start_token_id=0
    )
    replace(model, transformers.T5ForConditionalGeneration(config))


def replace(model: Path, other: transformers.PreTrainedModel) -> None:
    shutil.rmtree(model)
    other.save_pretrained(model)
    tokenizer().save_pretrained(model)


Change = Callable[[Path], Any]
# A change to a good model -> words of the one line that says what is wrong.
BAD_MODELS: dict[str, tuple[Change, list[str]]] = {
    "an encoder": (bert, ["causal LM", "Bert"]),
    "an encoder and decoder": (t5, ["causal LM", "T5"]),
    "of an unknown type": (lambda m: configure(m, model_type="llamalama"), ["llamalama"]),
    "config.json without a type": (lambda m: (m / "config.json").write_text("{}"), ["model_type"]),
    "config.json that is no JSON": (lambda m: (m / "config.json").write_text("{,"), ["config.json"]),
    "without config.json": (lambda m: (m / "config.json").unlink(), ["no config.json"]),
    "without weights": (lambda m: (m / "model.safetensors").unlink(), ["no weights", "model.safetensors"]),
    "with pickled weights only": (
        lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"),
        ["pickled weights", "safetensors"],
    ),
    "truncated": (lambda m: os.truncate(m / "model.safetensors", 90_000), ["model.safetensors", "truncated"]),
    "lacking a weight": (
        lambda m: save_file(
            {k: v for k, v in load_file(m / "model.safetensors").items() if "1.mlp.up_proj" not in k},
            m / "model.safetensors",
            metadata={"format": "pt"},
        ),
        ["lacks", "model.layers.1.mlp.up_proj.weight"],
    ),
    "with a weight of another shape": (
        lambda m: configure(m, intermediate_size=101),
        ["model.layers.", "mlp"],
    ),
    "without a tokenizer": (
        lambda m: set(map(os.remove, m.glob("tokenizer*"))),
        ["tokenizer"],
    ),
    "with NaN in a block": (
        lambda m: poison(m, "model.layers.0.mlp.up_proj.weight", float("nan")),
        ["model.layers.0.mlp.up_proj.weight", "NaN"],
    ),
    "with infinite embeddings": (
        lambda m: poison(m, "model.embed_tokens.weight", float("inf")),
        ["model.embed_tokens.weight", "infinite"],
    ),
    "quantized by something else": (
        lambda m: configure(m, quantization_config={"quant_method": "gptq", "bits": 4}),
        ["already quantized by gptq"],
    ),
    "quantized by signbit": (
        lambda m: configure(m, quantization_config={"quant_method": "signbit"}),
        ["already quantized by signbit"],
    ),
}


def the_line(captured: str) -> str:
    """The one line of stderr."""
    lines = captured.splitlines()
    assert len(lines) == 1, captured
    assert lines[0].startswith("signbit: ")
    return lines[0]


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_model(case: str, tiny_dir: MakeDir, text_file: Path, tmp_path: Path, capsys: Capture) -> None:
    change, words = BAD_MODELS[case]
    model = shutil.copytree(tiny_dir("llama"), tmp_path / "model")
    change(model)
    status = call("quantize", model, "--out", tmp_path / "out", "--calib", text_file, *OPTIONS)
    out, err = capsys.readouterr()
    assert status == 2, err
    assert not out
    line = the_line(err)
    assert all(word in line for word in words), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["missing", "truncated"])
def test_bad_shard(change: str, tiny_dir: MakeDir, text_file: Path, tmp_path: Path, capsys: Capture) -> None:
    model = shutil.copytree(tiny_dir("llama", max_shard_size="60KB"), tmp_path / "model")
    shard = sorted(model.glob("model-*.safetensors"))[2]
    if change == "missing":
        shard.unlink()
    else:
        os.truncate(shard, shard.stat().st_size - 1)
    assert call("quantize", model, "--out", tmp_path / "out", "--calib", text_file, *OPTIONS) == 2
    assert shard.name in the_line(capsys.readouterr().err)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


# Changed or additional arguments of a good command -> words of the one line. {tmp} is a directory with bad texts.
BAD_ARGUMENTS: dict[str, tuple[list[str], list[str]]] = {
    "unknown recipe": (["--recipe", "bilm"], ["no recipe or file 'bilm'", "'billm'"]),
    "unknown method": (["--set", "method=bilm"], ["unknown method 'bilm'", "'billm'"]),
    "unknown key": (["--set", "grup_size=3"], ["unknown recipe key 'grup_size'", "'group_size'"]),
    "key of another method": (["--recipe", "xnor", "--set", "salience=hessian"], ["unknown recipe key 'salience'"]),
    "value of a wrong type": (["--set", "group_size=many"], ["'group_size'", "'many'"]),
    "value out of range": (["--set", "damping=-1"], ["'damping'", "-1"]),
    "value that is no YAML": (["--set", "skip=[a"], ["--set", "skip=[a"]),
    "set without a value": (["--set", "group_size"], ["--set", "key=value"]),
    "recipe that is no YAML": (["--recipe", "{tmp}/bad.yaml"], ["bad.yaml", "YAML"]),
    "recipe that is a list": (["--recipe", "{tmp}/list.yaml"], ["list.yaml", "mapping"]),
    "no samples for a calibrated method": (["--samples", "0"], ["billm needs calibration"]),
    "negative samples": (["--samples", "-3"], ["'samples'"]),
    "sequences beyond the model's": (["--seqlen", "257"], ["257", "256 positions"]),
    "text too short": (["--samples", "100000"], ["too few for 100000 samples", "longer text"]),
    "text shorter than a sample": (["--calib", "{tmp}/short.txt"], ["too few"]),
    "empty text": (["--calib", "{tmp}/empty.txt"], ["empty.txt is empty"]),
    "text of spaces": (["--calib", "{tmp}/spaces.txt"], ["spaces.txt is empty"]),
    "text in Latin-1": (["--calib", "{tmp}/latin.txt"], ["latin.txt is not UTF-8", "byte 3"]),
    "text that does not exist": (["--calib", "{tmp}/nowhere.txt"], ["nowhere.txt does not exist"]),
    "jsonl without text": (["--calib", "{tmp}/bad.jsonl"], ["bad.jsonl, line 2", '"text"']),
    "text of another kind": (["--calib", "{tmp}/bad.yaml"], ["unknown text source", ".jsonl"]),
    "named text offline": (["--calib", "wikitext2"], ["wikitext2", "text file"]),
    "output without a parent": (["--out", "{tmp}/no/where"], ["does not exist", "create it first"]),
    "unknown device": (["--device", "tpu"], ["tpu", "cpu", "--help"]),
    "unknown option": (["--gpu"], ["--gpu", "--help"]),
    "number that is none": (["--samples", "x"], ["--samples", "'x'"]),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments(case: str, tiny_dir: MakeDir, text_file: Path, tmp_path: Path, capsys: Capture) -> None:
    arguments, words = BAD_ARGUMENTS[case]
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "short.txt").write_text("Too short.")
    (texts / "empty.txt").touch()
    (texts / "spaces.txt").write_text(" \n\t\n")
    (texts / "latin.txt").write_bytes("caf\xe9 noir ".encode("latin-1") * 2000)
    (texts / "bad.jsonl").write_text('{"text": "one"}\n{"txt": "two"}\n')
    (texts / "bad.yaml").write_text("a: [")
    (texts / "list.yaml").write_text("- method\n")
    given = [argument.replace("{tmp}", str(texts)) for argument in arguments]
    status = call("quantize", tiny_dir("llama"), "--out", tmp_path / "out", "--calib", text_file, *OPTIONS, *given)
    line = the_line(capsys.readouterr().err)
    assert status == 2
    assert all(word in line for word in words), line
    assert {path.name for path in tmp_path.iterdir()} == {"texts"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["quantise", "x"], ["quantise", "--help"]),
        (["quantize", "demo"], ["--out"]),
        (["quantize", "/no/such/model", "--out", "{out}"], ["/no/such/model does not exist"]),
        (["quantize", "./model.gguf", "--out", "{out}"], ["./model.gguf does not exist"]),
        (["quantize", "nobody/nothing", "--out", "{out}"], ["nobody/nothing is not on this machine"]),
        (["quantize", "no body", "--out", "{out}"], ["no body", "valid hub id"]),
        (["quantize", __file__, "--out", "{out}"], ["not a .gguf"]),
        (["quantize", "{text}.gguf", "--out", "{out}"], ["text.gguf", "GGUF"]),
        (["eval", "/no/such/model", "--perplexity", "{text}"], ["/no/such/model does not exist"]),
        (["eval", "{packed}", "--perplexity", "{text}", "--seqlen", "1"], ["seqlen"]),
        (["eval", "{packed}", "--perplexity", "{text}", "--seqlen", "9999"], ["9999", "256 positions"]),
        (["eval", "{packed}", "--perplexity", "{text}", "--seqlen", "64", "--windows", "0"], ["windows"]),
        (["eval", "{packed}", "--perplexity", "{short}", "--seqlen", "64"], ["fewer than one window of 64"]),
        (["eval", "{packed}", "--perplexity", "gutenberg", "--seqlen", "64"], ["unknown text source 'gutenberg'"]),
        (["eval", "{packed}", "--perplexity", "wikitext2", "--seqlen", "64"], ["wikitext2", "text file"]),
        (
            ["eval", "{packed}", "--perplexity", "{text}", "--seqlen", "64", "--against", "/no/such"],
            ["/no/such does not exist"],
        ),
        (
            ["eval", "{packed}", "--perplexity", "{text}", "--seqlen", "64", "--windows", "1", "--json", "/no/x"],
            ["/no/x"],
        ),
        (["inspect", "/no/such/model"], ["/no/such/model does not exist"]),
        (["inspect", "{empty}"], ["no config.json"]),
        (["generate", "{packed}", ""], ["prompt is empty"]),
        (["generate", "{packed}", "Hello", "--max-tokens", "0"], ["max-tokens"]),
        (["generate", "{packed}", "Hello", "--temperature", "-1"], ["temperature"]),
        (["generate", "/no/such/model", "Hello"], ["/no/such/model does not exist"]),
    ],
)
def test_bad_input_of_every_command(
    arguments: list[str], words: list[str], packed_dir: MakeDir, text_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    places = {"packed": packed_dir("llama"), "text": tmp_path / "text", "short": tmp_path / "short.txt"}
    places |= {"out": tmp_path / "out", "empty": tmp_path / "empty"}
    places["short"].write_text("Too short.")
    places["empty"].mkdir()
    (tmp_path / "text.gguf").write_bytes(b"GGUF?" * 50)
    given = [a.replace("{text}.gguf", f"{tmp_path}/text.gguf").replace("{text}", str(text_file)) for a in arguments]
    for key, place in places.items():
        given = [argument.replace(f"{{{key}}}", str(place)) for argument in given]
    status = call(*given)
    out, err = capsys.readouterr()
    assert status == 2, err
    assert not out
    last = err.splitlines()[-1]
    if "/no/x" not in given:  # there the result has been printed by then
        assert last == the_line(err)
    assert all(word in last for word in words), last
    assert not places["out"].exists()


def test_damaged_checkpoints(packed_dir: MakeDir, text_file: Path, tmp_path: Path, capsys: Capture) -> None:
    """Each command that reads one says which tensor, once."""
    packed = shutil.copytree(packed_dir("llama"), tmp_path / "packed")
    tensors = load_file(packed / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.packed.signs"
    tensors[name] = tensors[name].to(torch.int16)
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    for command in (
        ["inspect", packed],
        ["eval", packed, "--perplexity", text_file, "--seqlen", "64"],
        ["generate", packed, "Hello"],
    ):
        assert call(*command) == 2
        assert name in the_line(capsys.readouterr().err)


def test_bad_input_in_a_process_of_its_own(text_file: Path, tmp_path: Path, tiny_dir: MakeDir) -> None:
    """No warning of any library comes before the line, even after the model has been opened."""
    model = shutil.copytree(tiny_dir("llama"), tmp_path / "model")
    poison(model, "model.layers.0.mlp.up_proj.weight", float("nan"))
    found = run("quantize", model, "--out", tmp_path / "out", "--calib", text_file, *OPTIONS)
    assert found.returncode == 2
    assert not found.stdout
    assert "model.layers.0.mlp.up_proj.weight" in the_line(found.stderr)


def test_internal_errors_exit_with_1(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr("signbit.accounting.inspect", lambda _: 1 // 0)
    assert call("inspect", "demo") == 1
    err = capsys.readouterr().err
    assert "ZeroDivisionError" in err  # for the report of the bug
    assert err.splitlines()[-1].startswith("signbit: internal error")


def test_interrupting_exits_with_130(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("signbit.accounting.inspect", interrupt)
    assert call("inspect", "demo") == 130
    assert "interrupted" in the_line(capsys.readouterr().err.strip())
