"""Tokenizers as GGUF's metadata: what is recognised, and what is refused."""

from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from signbit import SignbitError
from signbit.exporting.gguf_tokenizer import add_tokenizer

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Written:
    """A writer that remembers what it was given."""

    def __init__(self) -> None:
        self.fields: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return lambda value: self.fields.__setitem__(name.removeprefix("add_"), value)


def byte_level(*before: Any, use_regex: bool = True) -> PreTrainedTokenizerFast:
    vocab = {token: index for index, token in enumerate(["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"])}
    bpe = Tokenizer(models.BPE(vocab, [("a", "b")]))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*before, last]) if before else last
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>")


def write(tokenizer: Any, vocab_size: int = 260) -> dict[str, Any]:
    writer: Any = Written()
    add_tokenizer(writer, tokenizer, vocab_size)
    fields: dict[str, Any] = writer.fields
    return fields


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def test_cuts() -> None:
    assert write(byte_level())["tokenizer_pre"] == "gpt-2"
    assert write(byte_level(pre_tokenizers.Digits(individual_digits=True)))["tokenizer_pre"] == "smollm"
    assert write(byte_level(split(QWEN2), use_regex=False))["tokenizer_pre"] == "qwen2"
    llama3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")
    assert write(byte_level(split(llama3), use_regex=False))["tokenizer_pre"] == "llama-bpe"


@pytest.mark.parametrize("step", [split(r"\w+"), pre_tokenizers.Whitespace(), pre_tokenizers.Digits()])
def test_unknown_cuts_are_refused(step: Any) -> None:
    with pytest.raises(SignbitError, match="not known to be one of llama"):
        write(byte_level(step))


def test_text_is_not_changed_first() -> None:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    assert write(tokenizer)["tokenizer_pre"] == "gpt-2"
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(SignbitError, match="its normalizer is Lowercase"):
        write(tokenizer)


def test_rows_without_tokens_and_tokens_without_rows() -> None:
    fields = write(byte_level(), vocab_size=270)
    assert fields["token_list"][0] == "<s>"
    assert fields["token_list"][258:] == [f"[PAD{index}]" for index in range(258, 270)]
    assert set(fields["token_types"][258:]) == {5}
    assert len(write(byte_level(), vocab_size=257)["token_list"]) == 257


def test_sentencepiece() -> None:
    """Scores fall with the order of pieces; bytes and special tokens are told apart."""
    pieces = ["<unk>", "<s>", "<0x0A>", "▁", "a", "▁a", "b"]
    bpe = Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, [("▁", "a")], unk_token="<unk>", byte_fallback=True)
    )
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    fields = write(PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", unk_token="<unk>"), len(pieces))
    assert fields["tokenizer_model"] == "llama"
    assert [int(kind) for kind in fields["token_types"]] == [2, 3, 6, 1, 1, 1, 1]
    assert fields["token_scores"] == [0.0, 0.0, 0.0, 0.0, -1.0, -2.0, -3.0]
    assert fields["add_space_prefix"] is True


def test_other_kinds_are_refused() -> None:
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(SignbitError, match="tokenizers of type WordLevel"):
        write(PreTrainedTokenizerFast(tokenizer_object=words))
    with pytest.raises(SignbitError, match=r"no tokenizer\.json"):
        write(object())
