"""Without a GPU: the tests of products in Triton's interpreter, and every kernel compiled for GPUs elsewhere."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton (signbit[gpu])")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="test_products.py runs on the GPU here")


@needs_triton
@without_gpu
@pytest.mark.timeout(900)
@pytest.mark.parametrize("marked", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_products_in_the_interpreter(marked: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marked]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(HERE / "test_products.py")], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in done.stdout


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_everything_compiles_for_gpus_that_are_not_here() -> None:
    command = [sys.executable, str(HERE / "compile_all.py"), "80", "90"]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads(done.stdout)
    layouts = {"haar_planes", "integers", "partial", "sign_planes", "split_planes", "structured"}
    assert {row["kernel"].split(".")[0] for row in rows} == layouts
    # What a program may have of an A100's and of an H100's shared memory.
    assert all(row["sm_80"]["shared"] <= 163 << 10 and row["sm_90"]["shared"] <= 227 << 10 for row in rows)
