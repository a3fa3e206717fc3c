"""Heat maps: which cell a layer is, and how dark."""

from typing import Any

import pytest

from signbit.report.heatmap import STEPS, Layers, Shades, heatmap

LAYERS: list[dict[str, Any]] = [
    {"name": "model.layers.0.self_attn.q_proj", "error": 0.5},
    {"name": "model.layers.1.self_attn.q_proj", "error": None},
    {"name": "model.layers.1.mlp.experts.0.up", "error": 0.1},
    {"name": "model.layers.1.mlp.experts.1.up", "error": 0.3},
    {"name": "projection", "error": 0.2},
]


def test_layers() -> None:
    found = Layers.of(LAYERS, ["error", "bits"])
    assert found.kinds == ["self_attn.q_proj", "mlp.experts.*.up", "projection"]
    assert found.blocks == 2
    assert found.values.keys() == {"error"}
    assert found.values["error"] == pytest.approx(
        {("self_attn.q_proj", 0): 0.5, ("mlp.experts.*.up", 1): 0.2, ("projection", 0): 0.2}
    )
    svg = heatmap(found, "error", found.kinds, Shades.over([0.2, 0.5], log=True), "<errors>")
    assert svg.count("<rect") == 3
    assert f'class="h{STEPS - 1}"' in svg
    assert "<errors>" not in svg


def test_no_layers() -> None:
    assert Layers.of([], ["error"]) == Layers([], 0, {})


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", [[], [0.0], [2.0, 2.0], [0.0, 1e-9, 1.0], [1.0, 2.0, 3.0]])
def test_shades(values: list[float], log: bool) -> None:
    shades = Shades.over(values, log=log)
    steps = [shades.step(value) for value in values]
    assert steps == sorted(steps)
    assert all(0 <= step < STEPS for step in steps)
    assert len(shades.edges()) == 3
