"""llama.cpp runs what was exported, and computes what signbit computes."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import signbit
from tiny import TEXT

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python, which is compiled where it is installed")
MakeDir = Callable[..., Path]
IDS = list(range(3, 40))
FAMILIES = ["llama", "llama biases", "llama3", "llama linear", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe"]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family: str, exact: bool, wide_dir: MakeDir, tmp_path: Path) -> None:
    """Dequantized models differ by the rounding of float16; with signs llama.cpp rounds activations to 8 bits, too."""
    checkpoint = wide_dir(family, **({} if exact else {"method": "billm"}))
    signbit.export(checkpoint, tmp_path / "out.gguf", to="gguf", type=None if exact else "f16")
    theirs = llama_cpp.Llama(str(tmp_path / "out.gguf"), n_ctx=128, verbose=False, logits_all=True, n_threads=1)
    theirs.eval(IDS)
    model, tokenizer = signbit.load(checkpoint)
    with torch.inference_mode():
        ours = model(torch.tensor([IDS])).logits[0].numpy()
    found = theirs.scores[: len(IDS)]
    near = np.abs(found - ours).max(-1) < (0.15 if exact else 0.02) * ours.std()
    # A token between two experts may be sent to the other one by the rounding of its activations.
    assert near.mean() >= (0.8 if exact and family in ("mixtral", "qwen3_moe") else 1)
    text = TEXT[:300] + " It's 1912!\n\n  “cold”"
    assert theirs.tokenize(text.encode(), add_bos=False) == tokenizer(text).input_ids, json.dumps(text)
