"""The report beside a checkpoint."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import signbit
from signbit.report.beside import FILE, checkpoint_page

MakeDir = Callable[..., Path]


def test_what_it_says(packed_dir: MakeDir) -> None:
    packed = packed_dir("llama")
    page = (packed / FILE).read_text(encoding="utf-8")
    found = signbit.inspect(packed)
    assert f"{found['bits_per_weight']:.4f}" in page
    for layer in found["layers"]:
        assert f"{layer['output_error']:.4g}".rstrip("0")[:4] in page
    for item in found["items"]:
        assert f">{item}<" in page
    assert "signbit quantize" in page


def test_it_says_nothing_of_where_it_lies(packed_dir: MakeDir, tmp_path: Path) -> None:
    packed = packed_dir("llama")
    shutil.copytree(packed, tmp_path / "elsewhere")
    assert checkpoint_page(tmp_path / "elsewhere") == (packed / FILE).read_text(encoding="utf-8")
    assert not re.search(r"\.partial|staging", checkpoint_page(packed))


def test_without_errors_of_layers_there_is_still_a_page(packed_dir: MakeDir, tmp_path: Path) -> None:
    """save_pretrained does not keep them."""
    shutil.copytree(packed_dir("llama"), tmp_path / "copy")
    (tmp_path / "copy" / "signbit_report.json").unlink()
    page = checkpoint_page(tmp_path / "copy")
    assert "Bits of each layer" in page
    assert "Error of each layer" not in page


def test_experts_are_one_row(packed_dir: MakeDir) -> None:
    page = checkpoint_page(packed_dir("mixtral"))
    assert page.count("mlp.experts.*.down_proj of block") == 2 * 2  # bits and errors, of two blocks
