"""Tiny random models of every family the tests cover, with a working tokenizer and a text to calibrate on.

Sizes are small and often no multiple of 32, since that is where packing goes wrong.
"""

import random
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

VOCAB = 300
POSITIONS = 256
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
SPECIAL_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
# Fast, and with several groups in every matrix.
SMALL_RECIPE = {"method": "billm", "group_size": 32, "samples": 8, "seqlen": 48}


# --- text -------------------------------------------------------------------------------------------------------------

_WHO = [
    "The old ferryman",
    "A clockmaker from the hill town",
    "My neighbour's youngest daughter",
    "The night porter",
    "An engineer with a wooden leg",
    "The schoolteacher",
    "Our cook",
    "A stranger in a grey coat",
    "The widow who kept bees",
    "Nobody in the village",
    "The harbour pilot",
    "A boy of nine",
]
_DID = [
    "mended the broken lantern",
    "counted 37 boats on the river",
    "wrote a long letter to the mayor",
    "carried two buckets of salt water up the stairs",
    "asked why the bridge had been closed",
    "sold the last of the winter apples",
    "remembered the way through the marsh",
    "found a brass key under the floor",
    "said very little about the accident",
    "drew a map of the coast from memory",
    "learned to tell the weather by the smell of the wind",
    "played the same tune on a borrowed violin",
]
_WHEN = [
    "before the rain began",
    "in the spring of 1912",
    "while the kettle was boiling",
    "after the market had closed",
    "on the coldest night of the year",
    "long before the railway came",
    "as soon as the tide turned",
    "when the bells rang for the third time",
    "at about half past six",
    "during the week of the fair",
]
_THEN = [
    "and nobody thought to ask for the reason.",
    "but the door was already locked.",
    "so the whole street came out to look.",
    "which was more than anyone had expected.",
    "because there was nothing else to be done.",
    "and that, as they say, was the end of it.",
    "though the price had doubled since the autumn.",
    "and the dog slept through all of it.",
    "until somebody laughed.",
    "and by morning the snow had covered every trace.",
]
_ASIDE = [
    "It was not the first time.",
    "“You will see,” said the baker, “it always ends like this.”",
    "Three things were certain: the hour, the place, and the colour of the paint.",
    "What does a lighthouse do by day?",
    "The room smelled of tar, oranges and wet wool.",
    "Few people believed the story; fewer still could prove it wrong.",
    "Such was the custom there.",
    "(The ledger for that year is missing.)",
]


def _write(paragraphs: int = 24, sentences: int = 5) -> str:
    choose = random.Random(1).choice
    text = []
    for _ in range(paragraphs):
        lines = [f"{choose(_WHO)} {choose(_DID)} {choose(_WHEN)}, {choose(_THEN)}" for _ in range(sentences)]
        lines.insert(2, choose(_ASIDE))
        text.append(" ".join(lines))
    return "\n\n".join(text) + "\n"


TEXT = _write()


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text goes in, and comes out unchanged."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(
            vocab_size=VOCAB,
            special_tokens=list(SPECIAL.values()),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=POSITIONS, **SPECIAL)


# --- models -----------------------------------------------------------------------------------------------------------


def _config(name: str, **changes: Any) -> PreTrainedConfig:
    usual: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": POSITIONS,
        **SPECIAL_IDS,
    }
    return getattr(transformers, name)(**{**usual, **changes})


def _opt(**changes: Any) -> PreTrainedConfig:
    return _config("OPTConfig", **{"ffn_dim": 100, "word_embed_proj_dim": 64, "dropout": 0.0, **changes})


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: _config("LlamaConfig", hidden_size=72, intermediate_size=100, num_attention_heads=6, head_dim=12),
    "mistral": lambda: _config("MistralConfig", intermediate_size=112, sliding_window=48),
    # qkv with bias
    "qwen2": lambda: _config("Qwen2Config", hidden_size=56, intermediate_size=104, num_attention_heads=4),
    # heads wider than the hidden size: q_proj is 80 x 64
    "qwen3": lambda: _config("Qwen3Config", intermediate_size=100, head_dim=20, tie_word_embeddings=True),
    "gemma2": lambda: _config(
        "Gemma2Config", intermediate_size=100, head_dim=16, query_pre_attn_scalar=16, sliding_window=32
    ),
    "gemma3": lambda: _config(
        "Gemma3TextConfig",
        num_hidden_layers=4,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "opt": _opt,
    # as opt-350m: linears outside the blocks (project_in, project_out), norms after them
    "opt_projected": lambda: _opt(word_embed_proj_dim=40, do_layer_norm_before=False),
    "gpt_neox": lambda: _config("GPTNeoXConfig", intermediate_size=100),  # fused qkv, parallel residual
    "phi3": lambda: _config("Phi3Config", intermediate_size=84),  # fused qkv and gate_up
    "gpt2": lambda: _config("GPT2Config", n_embd=60, n_inner=100, n_layer=2, n_head=4, n_positions=POSITIONS),  # Conv1D
    # first layer dense, second with experts
    "qwen3_moe": lambda: _config(
        "Qwen3MoeConfig",
        head_dim=16,
        moe_intermediate_size=40,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[0],
    ),
    "mixtral": lambda: _config("MixtralConfig", intermediate_size=72, num_local_experts=4, num_experts_per_tok=2),
}


def build(family: str, *, tie: bool | None = None, seed: int = 0) -> PreTrainedModel:
    """A random model in fp32, in eval mode. `tie` overrides whether the head shares the embedding."""
    config = CONFIGS[family]()
    if tie is not None:
        config.tie_word_embeddings = tie
    return random_model(config, seed)


def random_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """The same for any configuration."""
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # The usual initialisation (std 0.02, biases 0, norms 1) would hide a lost bias or norm, and give flat predictions.
    torch.manual_seed(seed)  # here, so that the weights do not depend on how transformers initialises
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {family: partial(build, family) for family in CONFIGS}


def save_tiny(
    family: str,
    directory: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    tie: bool | None = None,
    max_shard_size: int | str | None = None,
) -> Path:
    """Write model and tokenizer as an ordinary Hugging Face directory."""
    directory = Path(directory)
    shards = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    build(family, tie=tie).to(dtype).save_pretrained(directory, **shards)
    tokenizer().save_pretrained(directory)
    return directory
