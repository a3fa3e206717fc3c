"""``signbit methods``."""

from __future__ import annotations

from typing import Any

import click

from signbit import console
from signbit.cli import options as shared
from signbit.methods import METHODS
from signbit.recipe import CommonOptions, presets
from signbit.training.options import TrainingOptions


@click.command("methods")
@shared.json_option
def methods_command(json_file: str | None) -> None:
    """Every method: its paper, its layout, its options with their defaults."""
    described = [
        {
            "name": method.name,
            "summary": method.summary,
            "paper": method.paper,
            "layout": method.layout.kind,
            "calibrated": method.calibrated,
            "options": _describe_options(method.options),
        }
        for method in METHODS.values()
    ]
    common, training = _describe_options(CommonOptions), _describe_options(TrainingOptions)
    for method in METHODS.values():
        console.console.print(f"{method.name}: {method.summary}\n  {method.paper}; layout {method.layout.kind}")
        _print_options(_describe_options(method.options))
    console.console.print("every recipe", style="bold")
    _print_options(common)
    console.console.print("training", style="bold")
    _print_options(training)
    console.console.print(f"presets: {', '.join(presets())}")
    result = {"methods": described, "common_options": common, "training_options": training, "presets": presets()}
    shared.write_json(result, json_file)


def _describe_options(model: Any) -> dict[str, dict[str, Any]]:
    return {
        name: {"default": model.model_fields[name].default, "description": model.model_fields[name].description}
        for name in model.model_fields
    }


def _print_options(options: dict[str, dict[str, Any]]) -> None:
    for name, option in options.items():
        console.console.print(f"    {name}={option['default']}  {option['description']}")
