"""Where there is no GPU, test_products.py runs in Triton's interpreter, which an environment variable chooses when
Triton is first imported: so test_interpreted.py runs it in a process of its own, and here it is left out."""

import importlib.util
import os

import torch

collect_ignore: list[str] = []

if importlib.util.find_spec("triton") is None or not (
    torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
):
    collect_ignore.append("test_products.py")
