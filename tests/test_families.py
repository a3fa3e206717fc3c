"""Every family, from an ordinary model to a packed checkpoint and back, by signbit and by transformers alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import signbit
from signbit.architectures import find_blocks, linears_of, replace_module, unfuse_experts
from signbit.layouts import Layout, parse_spec
from signbit.modules import QuantizedLinear
from stored import unpadded
from tiny import CONFIGS, SMALL_RECIPE, VOCAB

MakeDir = Callable[..., Path]
IDS = torch.randint(3, VOCAB, (2, 70), generator=torch.Generator().manual_seed(3))
FAMILIES_AND_CODECS = [(family, codec) for family in CONFIGS for codec in ("keep", "int8")]
BITWISE_SAVE = Version(transformers.__version__) >= Version("5.23")


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(IDS.to(model.device), use_cache=False).logits.cpu()


def config_of(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config


def weights_of(directory: Path) -> tuple[bytes, bytes]:
    return unpadded((directory / "model.safetensors").read_bytes())


def layers_of(directory: Path) -> dict[str, Layout]:
    """The packed matrices of a checkpoint, read from its file and config.json with nothing in between."""
    stored = load_file(directory / "model.safetensors")
    layers = {}
    for name, description in config_of(directory)["quantization_config"]["layers"].items():
        layout, spec = parse_spec(name, description)
        layers[name] = layout(spec, {key: stored[f"{name}.packed.{key}"] for key in spec.tensors()})
    return layers


def in_memory(original: Path, packed: Path, storage: torch.dtype) -> PreTrainedModel:
    """The quantized model, built from the original one: packed linears put in, all else rounded to ``storage``."""
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False).copy_(parameter.to(storage))
    unfuse_experts(model)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers = layers_of(packed)
    for name, layout in layers.items():
        module = model.get_submodule(name)
        if module is embeddings or module is head:
            module.weight.data = layout.dequantize()
            if model.config.tie_word_embeddings:
                head.weight = embeddings.weight
        else:
            replace_module(model, name, QuantizedLinear(layout, module.bias))
    return model


@pytest.mark.parametrize(("family", "codec"), FAMILIES_AND_CODECS)
def test_loaded_is_what_was_quantized(family: str, codec: str, tiny_dir: MakeDir, packed_dir: MakeDir) -> None:
    """Logits of the loaded model and of the model in memory are equal bit for bit."""
    packed = packed_dir(family, embeddings=codec)
    model, _ = signbit.load(packed)
    wanted = logits(in_memory(tiny_dir(family), packed, torch.float32))
    assert torch.equal(logits(model), wanted)
    assert not torch.equal(wanted, logits(AutoModelForCausalLM.from_pretrained(tiny_dir(family))))


@pytest.mark.parametrize("family", CONFIGS)
def test_every_linear_of_every_block_is_quantized(family: str, packed_dir: MakeDir) -> None:
    packed = packed_dir(family)
    outline = AutoModelForCausalLM.from_config(CONFIGS[family]())
    unfuse_experts(outline)
    prefix, blocks = find_blocks(outline)
    linears = {f"{prefix}.{i}.{name}" for i, block in enumerate(blocks) for name in linears_of(block)}
    assert config_of(packed)["quantization_config"]["layers"].keys() == linears
    report = json.loads((packed / "signbit_report.json").read_text())
    assert {layer["name"] for layer in report["layers"]} == linears
    # 384 random tokens reach everything, and give Hessians that need no help; a ReLU may be off on all of them.
    notes = [note for layer in report["layers"] for note in layer["notes"]]
    assert all("always zero" in note and family.startswith("opt") for note in notes)


@pytest.mark.parametrize(("family", "codec"), FAMILIES_AND_CODECS)
def test_report_says_what_is_left(family: str, codec: str, packed_dir: MakeDir) -> None:
    """Each tensor of the file belongs to a packed matrix, is its bias, or is listed as left alone, with the reason."""
    packed = packed_dir(family, embeddings=codec)
    stored = set(load_file(packed / "model.safetensors"))
    unquantized = signbit.inspect(packed)["unquantized"]
    biases = {f"{name}.bias" for name in config_of(packed)["quantization_config"]["layers"]}
    assert stored - unquantized.keys() - biases == {name for name in stored if ".packed." in name}
    # What is listed is stored, but for a tied head, which is stored as the embeddings.
    # With int8 the head is not left alone either.
    tied = {name for name, why in unquantized.items() if why == "output head" and codec == "keep"}
    assert unquantized.keys() - stored <= tied


@pytest.mark.parametrize(("family", "codec"), FAMILIES_AND_CODECS)
def test_nothing_dense_is_loaded(family: str, codec: str, packed_dir: MakeDir) -> None:
    """The tensors of the loaded model are those of the file, byte by byte, and no others as large as a linear."""
    packed = packed_dir(family, embeddings=codec)
    model = AutoModelForCausalLM.from_pretrained(packed)
    stored = load_file(packed / "model.safetensors")
    state = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}.values()
    assert sum(t.nbytes for t in state) == sum(t.nbytes for t in stored.values())
    shapes = {layer.shape for layer in layers_of(packed).values() if layer.kind != "integers"}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert not tensor.is_floating_point() or tuple(tensor.shape) not in shapes, name
        assert not tensor.is_floating_point() or tuple(tensor.shape[::-1]) not in shapes, name


@pytest.mark.parametrize(("family", "codec"), FAMILIES_AND_CODECS)
def test_transformers_round_trip(family: str, codec: str, packed_dir: MakeDir, tmp_path: Path) -> None:
    packed = packed_dir(family, embeddings=codec)
    wanted = logits(signbit.load(packed)[0])
    model = AutoModelForCausalLM.from_pretrained(packed)
    assert torch.equal(logits(model), wanted)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), wanted)
    assert config_of(tmp_path)["quantization_config"] == config_of(packed)["quantization_config"]
    if BITWISE_SAVE:
        assert weights_of(tmp_path) == weights_of(packed)
        assert (tmp_path / "config.json").read_bytes() == (packed / "config.json").read_bytes()


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("codec", ["keep", "int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "opt", "gpt2"])
def test_tied_and_untied_heads(
    family: str, codec: str, tie: bool, tiny_dir: MakeDir, packed_dir: MakeDir, tmp_path: Path
) -> None:
    codecs = {"embeddings": codec} if tie else {"embeddings": codec, "head": codec}
    packed = packed_dir(family, {"tie": tie}, **codecs)
    stored = load_file(packed / "model.safetensors")
    assert any(name.startswith("lm_head.") for name in stored) != tie
    wanted = logits(in_memory(tiny_dir(family, tie=tie), packed, torch.float32))
    model = AutoModelForCausalLM.from_pretrained(packed)
    assert torch.equal(logits(model), wanted)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), wanted)
    if BITWISE_SAVE:
        assert weights_of(tmp_path) == weights_of(packed)


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, "cpu"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral"])
def test_device_maps(family: str, device_map: Any, packed_dir: MakeDir) -> None:
    packed = packed_dir(family, embeddings="int8")
    wanted = logits(signbit.load(packed)[0])
    for model in (
        AutoModelForCausalLM.from_pretrained(packed, device_map=device_map),
        signbit.load(packed, device_map=device_map, dtype=torch.float32)[0],
    ):
        if torch.cuda.is_available() and device_map == "auto":
            torch.testing.assert_close(logits(model), wanted, rtol=1e-3, atol=1e-3)
        else:
            assert torch.equal(logits(model), wanted)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_sharded_source(family: str, tiny_dir: MakeDir, packed_dir: MakeDir) -> None:
    sharded = {"max_shard_size": "60KB"}
    assert len(list(tiny_dir(family, **sharded).glob("model-*.safetensors"))) > 2
    file = "model.safetensors"
    assert (packed_dir(family, sharded) / file).read_bytes() == (packed_dir(family) / file).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral"])
def test_16_bit_sources(
    family: str, dtype: torch.dtype, tiny_dir: MakeDir, packed_dir: MakeDir, tmp_path: Path
) -> None:
    packed = packed_dir(family, {"dtype": dtype})
    stored = load_file(packed / "model.safetensors")
    assert {t.dtype for name, t in stored.items() if ".packed." not in name and t.is_floating_point()} == {dtype}
    model, _ = signbit.load(packed)  # computes in float32, whatever is stored
    wanted = logits(in_memory(tiny_dir(family, dtype=dtype), packed, dtype))
    assert wanted.dtype == torch.float32
    assert torch.equal(logits(model), wanted)
    model = AutoModelForCausalLM.from_pretrained(packed)
    assert model.dtype == dtype
    assert logits(model).isfinite().all()
    model.save_pretrained(tmp_path)
    if BITWISE_SAVE:
        assert weights_of(tmp_path) == weights_of(packed)


@pytest.mark.parametrize(("name", "dtype"), [("float16", torch.float16), ("bfloat16", torch.bfloat16)])
def test_recipe_chooses_the_storage_dtype(
    name: str, dtype: torch.dtype, tiny_dir: MakeDir, packed_dir: MakeDir
) -> None:
    """What is quantized decides on weights as they are; what is kept is rounded, and later blocks see it rounded."""
    packed = packed_dir("llama", dtype=name, scale_dtype=name)
    stored = load_file(packed / "model.safetensors")
    assert {t.dtype for t in stored.values() if t.is_floating_point()} == {dtype}
    assert config_of(packed)["dtype"] == name
    wanted = logits(in_memory(tiny_dir("llama"), packed, dtype))
    assert torch.equal(logits(signbit.load(packed)[0]), wanted)


def test_recipe_is_kept_in_full(packed_dir: MakeDir, text_file: Path) -> None:
    packed = packed_dir("llama", embeddings="int8")
    quantization = config_of(packed)["quantization_config"]
    kept = {
        key: value
        for key, value in quantization.items()
        if key not in ("quant_method", "format_version", "layers", "outer_modules")
    }
    recipe = signbit.Recipe({**SMALL_RECIPE, "calib": str(text_file), "embeddings": "int8"})
    assert kept == recipe.to_dict() == signbit.inspect(packed)["recipe"]
    assert signbit.Recipe(kept).to_dict() == kept
    assert quantization["quant_method"] == "signbit"


@pytest.mark.parametrize("family", CONFIGS)
def test_generation_goes_on_as_from_scratch(family: str, packed_dir: MakeDir) -> None:
    """With the cache of keys and values, which evaluation does not use."""
    model, tokenizer = signbit.load(packed_dir(family))
    prompt = tokenizer("The old ferryman", return_tensors="pt").input_ids
    written = model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=2)
    for end in range(prompt.shape[1], written.shape[1]):
        assert int(model(written[:, :end]).logits[0, -1].argmax()) == int(written[0, end])
