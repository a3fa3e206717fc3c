"""Run by torchrun: the processes quantize each case of a JSON file together, a list of {model, out, recipe}.

What is begun is gone on with.
"""

import json
import sys
from pathlib import Path

import transformers

import signbit

if __name__ == "__main__":
    transformers.logging.disable_progress_bar()
    for case in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        signbit.quantize(case["model"], case["out"], signbit.Recipe(case["recipe"]), device="cpu", resume=True)
