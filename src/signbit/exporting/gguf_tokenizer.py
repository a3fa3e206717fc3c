"""A tokenizer of transformers as the metadata that llama.cpp makes its own from.

llama.cpp knows two kinds that are met here: byte-level BPE ("gpt2": tokens and merges; the way text is cut before is
one of its own, by name) and SentencePiece's BPE ("llama": tokens with scores). The first is told from the second by its
pre-tokenizer; the name of the cut is looked up by what tokenizer.json says of it, and one that is not known is refused:
text would be read as other tokens than the model was made with.
"""

from __future__ import annotations

import json
import re
from typing import Any

from gguf import GGUFWriter, TokenType

from signbit.errors import SignbitError

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# What is done before BPE, as _cut puts it -> the name that llama.cpp has for it.
_CUTS = {
    "bytes with regex": "gpt-2",
    "single digits, bytes with regex": "smollm",
    f"{_WORDS % ''}, bytes": "qwen2",
    f"{_WORDS % '{1,3}'}, bytes": "llama-bpe",
}
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def add_tokenizer(writer: GGUFWriter, tokenizer: Any, vocab_size: int) -> None:
    """Describe ``tokenizer``; vocab_size: rows of the embeddings, which may be more than it has tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise SignbitError(
            "the tokenizer has no tokenizer.json, which exporting to GGUF reads: export to dense instead"
        )
    description = json.loads(backend.to_str())
    model = description["model"]
    if model["type"] != "BPE":
        raise SignbitError(f"tokenizers of type {model['type']} are not exported to GGUF: export to dense instead")
    vocab: dict[str, int] = tokenizer.get_vocab()
    added = {token["id"]: token for token in description["added_tokens"]}
    # Some tokenizers have tokens that the model has no embeddings for; they could not be used anyway.
    tokens = {index: token for token, index in vocab.items()}
    names = [tokens.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    types = [_type(i, tokens.get(i), added, model) for i in range(vocab_size)]
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(names, types))
        writer.add_add_space_prefix(tokenizer.tokenize("a")[:1] == ["▁a"])
    else:
        _refuse_normalizer(description)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_cut_name(description))
        writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
        writer.add_add_space_prefix(False)
    writer.add_token_list(names)
    writer.add_token_types(types)
    _add_special(writer, tokenizer, vocab_size)


def _add_special(writer: GGUFWriter, tokenizer: Any, vocab_size: int) -> None:
    for index, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.eos_token_id, writer.add_eos_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if index is not None and index < vocab_size:
            add(index)
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id])
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and ids[-1:] == [tokenizer.eos_token_id])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _type(index: int, token: str | None, added: dict[int, dict[str, Any]], model: dict[str, Any]) -> TokenType:
    if token is None:
        return TokenType.UNUSED
    if model.get("byte_fallback") and token == model.get("unk_token"):
        return TokenType.UNKNOWN
    if index in added:
        return TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED
    return TokenType.BYTE if model.get("byte_fallback") and _BYTE.fullmatch(token) else TokenType.NORMAL


def _scores(names: list[str], types: list[TokenType]) -> list[float]:
    """SentencePiece orders the pieces of a BPE by their scores, which are 0, -1, -2, ...; tokenizer.json has only that
    order. What is not a piece has none to compete with."""
    scores, rank = [0.0] * len(names), 0
    for index, kind in enumerate(types):
        if kind == TokenType.NORMAL:
            scores[index] = -float(rank)
            rank += 1
    return scores


def _refuse_normalizer(description: dict[str, Any]) -> None:
    """llama.cpp changes no text before it cuts it. NFC is let through: nearly all text is in that form already, and its
    own converter does the same with Qwen's."""
    kind = (description["normalizer"] or {"type": "NFC"})["type"]
    if kind != "NFC":
        raise SignbitError(
            f"the tokenizer changes text first (its normalizer is {kind}), which llama.cpp does not: export to dense "
            "instead"
        )


def _cut_name(description: dict[str, Any]) -> str:
    steps = description["pre_tokenizer"] or {}
    cut = ", ".join(map(_cut, steps.get("pretokenizers", [steps])))
    if cut not in _CUTS:
        raise SignbitError(
            "the tokenizer cuts text in a way that is not known to be one of llama.cpp's: export to dense and use "
            "llama.cpp's convert_hf_to_gguf.py"
        )
    return _CUTS[cut]


def _cut(step: dict[str, Any]) -> str:
    """One step of a pre-tokenizer, in words."""
    if step.get("type") == "ByteLevel" and not step["add_prefix_space"]:
        return "bytes with regex" if step.get("use_regex", True) else "bytes"
    if step.get("type") == "Digits" and step["individual_digits"]:
        return "single digits"
    if step.get("type") == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return str(step["pattern"].get("Regex"))
    return "something else"
