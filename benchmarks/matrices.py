"""What presets make of single matrices: bits, and output error on text that was calibrated on and on text that was not.

    python benchmarks/matrices.py MODEL --calib TRAIN --heldout TEST --layer model.layers.10.mlp.up_proj ... \\
        --run "sign-factors bits=0.8" dbf nanoquant ... [--samples 16] [--heldout-samples 8] [--seqlen 512]

A run is a preset with changed keys behind it. Inputs are those of the original model, so runs differ in nothing but the
method; errors are tr(D H D^T) / tr(W H W^T), without tuning and without bias correction.
"""

from __future__ import annotations

import argparse
import time

import torch

from signbit.architectures import dense_weight
from signbit.calibration.hessian import HessianAccumulator, factorize, quadratic
from signbit.calibration.text import read_text
from signbit.calibration.tokens import random_windows, tokenize
from signbit.inference import open_model
from signbit.recipe import Recipe, parse_overrides


@torch.inference_mode()
def hessians(model, tokenizer, text: str, samples: int, seqlen: int, layers: list[str]) -> dict[str, torch.Tensor]:
    """H of each layer's input on random windows of a text."""
    found = {name: HessianAccumulator(model.get_submodule(name).in_features, model.device) for name in layers}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, one=one: one.add(inputs[0]))
        for name, one in found.items()
    ]
    tokens = tokenize(tokenizer, read_text(text, "train"), model.config)
    for window in random_windows(tokens, samples, seqlen, seed=0):
        model(input_ids=window.unsqueeze(0), use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: one.hessian() for name, one in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--layer", nargs="+", required=True)
    parser.add_argument("--run", nargs="+", required=True)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--heldout-samples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=512)
    arguments = parser.parse_args()
    model, tokenizer = open_model(arguments.model, device="cpu")
    layers, seqlen = arguments.layer, arguments.seqlen
    calibrated = hessians(model, tokenizer, arguments.calib, arguments.samples, seqlen, layers)
    heldout = hessians(model, tokenizer, arguments.heldout, arguments.heldout_samples, seqlen, layers)
    print(f"{'layer':40} {'run':32} {'bits':>7} {'calib':>7} {'heldout':>7} {'seconds':>8}")
    for name in layers:
        linear = model.get_submodule(name)
        weight = dense_weight(linear, linear.weight).detach().float()
        for run in arguments.run:
            preset, *changes = run.split()
            recipe = Recipe.load(preset, parse_overrides(changes))
            began = time.perf_counter()
            with torch.no_grad():
                packed = recipe.method.quantize(
                    weight, factorize(calibrated[name], recipe.common.damping), recipe.options
                )
            seconds = time.perf_counter() - began
            error = weight - packed.dequantize()
            shares = [quadratic(error, H) / quadratic(weight, H) for H in (calibrated[name], heldout[name])]
            bits = 8 * sum(packed.items().values()) / weight.numel()
            print(f"{name:40} {run:32} {bits:7.4f} {shares[0]:7.4f} {shares[1]:7.4f} {seconds:8.1f}", flush=True)


if __name__ == "__main__":
    main()
