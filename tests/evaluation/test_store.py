"""Answers that are kept, whatever happens to the process that keeps them."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from signbit.errors import SignbitError
from signbit.evaluation.store import Store, content_hash, default_cache, hash_of

MakeDir = Callable[..., Path]


def test_values_survive(tmp_path: Path) -> None:
    with Store(tmp_path / "new" / "folder", {"model": "a"}) as store:
        assert "k" not in store
        store.put("k", [-1.5, True])
        store.put("text", "é\u2028\n")
        # No closing: what was put is on disk already.
        assert Store(tmp_path / "new" / "folder", {"model": "a"})["k"] == [-1.5, True]
    again = Store(tmp_path / "new" / "folder", {"model": "a"})
    assert again["text"] == "é\u2028\n"
    assert json.loads(again.file.read_text().splitlines()[0]) == {"identity": {"model": "a"}}


def test_identities_are_apart(tmp_path: Path) -> None:
    Store(tmp_path, {"model": "a"}).put("k", 1)
    assert "k" not in Store(tmp_path, {"model": "b"})
    assert "k" not in Store(tmp_path, {"model": "a", "activations": "int8"})


def test_fresh_forgets(tmp_path: Path) -> None:
    Store(tmp_path, {}).put("k", 1)
    assert "k" not in Store(tmp_path, {}, fresh=True)
    assert "k" not in Store(tmp_path, {})


@pytest.mark.parametrize("cut", range(1, 12))
def test_half_a_line_is_no_answer(tmp_path: Path, cut: int) -> None:
    """Cut anywhere in the last line, the rest is kept, and more can be put."""
    store = Store(tmp_path, {})
    store.put("first", 1)
    store.put("second", [2.25, False])
    os.truncate(store.file, store.file.stat().st_size - cut)
    again = Store(tmp_path, {})
    assert again["first"] == 1
    assert ("second" in again) == (cut == 1)  # only the line feed is missing
    again.put("third", 3)
    last = Store(tmp_path, {})
    assert (last["first"], last["third"]) == (1, 3)


def test_damage_is_unanswered(tmp_path: Path) -> None:
    store = Store(tmp_path, {})
    store.put("k", 1)
    with store.file.open("ab") as stream:
        stream.write(b'\xff\xfe\n[]\n["k"]\n{"k": 2}\n[1, 2]\n"k"\n')
    assert Store(tmp_path, {})["k"] == 1


def test_two_processes_share_a_file(tmp_path: Path) -> None:
    one, other = Store(tmp_path, {}), Store(tmp_path, {})
    for number in range(20):
        (one, other)[number % 2].put(str(number), number)
    assert [Store(tmp_path, {})[str(number)] for number in range(20)] == list(range(20))


def test_directories_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SignbitError, match="--cache"):
        Store(tmp_path / "file", {})


def test_the_users_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "signbit" / "evaluation"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache().is_relative_to(Path.home())


def test_hashes() -> None:
    assert hash_of({"a": 1, "b": 2}) == hash_of({"b": 2, "a": 1})
    assert hash_of(["ab", "c"]) != hash_of(["a", "bc"])


def test_models_are_told_apart_by_content(packed_dir: MakeDir, tmp_path: Path) -> None:
    packed = packed_dir("llama")
    copied = shutil.copytree(packed, tmp_path / "copied")
    assert content_hash(copied) == content_hash(packed)
    (copied / "README.md").write_text("A model card.")
    (copied / "signbit_report.json").write_text("{}")
    assert content_hash(copied) == content_hash(packed)
    weights = bytearray((copied / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copied / "model.safetensors").write_bytes(weights)
    assert content_hash(copied) != content_hash(packed)
    config = shutil.copytree(packed, tmp_path / "config")
    (config / "tokenizer_config.json").write_text("{}")
    assert content_hash(config) != content_hash(packed)
    assert content_hash(packed / "model.safetensors") != content_hash(packed / "config.json")
