"""Snapshots while they are read."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from signbit.training.record import Record
from signbit.training.snapshot import FILE, Snapshot


def parameters(value: float) -> nn.ParameterDict:
    return nn.ParameterDict({name: nn.Parameter(torch.full((3,), value + i)) for i, name in enumerate("ab")})


def save(directory: Path, value: float, steps: int) -> None:
    record = Record(losses=[{"loss": 1.0, "gradient": 1.0}] * steps)
    tensors = {name: parameter.detach() for name, parameter in parameters(value).items()}
    save_file(tensors, directory / "new", metadata={"record": record.to_json()})
    (directory / "new").replace(directory / FILE)


def test_all_of_it_is_of_one_snapshot_though_another_takes_its_place(tmp_path: Path) -> None:
    """The record grows with each step, and with it the offsets of the tensors."""
    save(tmp_path, 1.0, steps=2)
    found = Snapshot.of(tmp_path)
    assert found is not None
    save(tmp_path, 5.0, steps=40)
    model = parameters(0.0)
    found.restore("", model)
    assert {name: parameter.tolist() for name, parameter in model.items()} == {"a": [1.0] * 3, "b": [2.0] * 3}
    assert found.record.steps == 2
    found.close()
    assert Snapshot.of(tmp_path / "elsewhere") is None
