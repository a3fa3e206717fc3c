"""Talking: what is kept between turns changes nothing but the time, and the terminal does what it is told."""

import copy
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import FalconConfig, FalconForCausalLM, PreTrainedModel

from servers import TEMPLATE
from signbit.architectures import find_blocks
from signbit.errors import SignbitError
from signbit.serving.conversation import Conversation
from signbit.serving.prompts import Prompts
from signbit.serving.sampling import Sampling
from signbit.serving.terminal import Terminal, printable
from tiny import SPECIAL_IDS, VOCAB, build, tokenizer


def conversation(model: PreTrainedModel | None = None, context: int = 250, *, template: bool = True) -> Conversation:
    words = copy.deepcopy(tokenizer())
    words.chat_template = TEMPLATE if template else None
    model = model or build("llama")
    return Conversation(model, words, Prompts(words, model.config, context), Sampling(), max_tokens=12)


def falcon() -> PreTrainedModel:
    """Its keys are not like others' to the batch; here they are read by one."""
    torch.manual_seed(0)
    usual = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, **SPECIAL_IDS}
    return FalconForCausalLM(FalconConfig(**usual, num_attention_heads=4, alibi=True)).eval()


@pytest.mark.parametrize("make", [lambda: build("llama"), lambda: build("gemma3"), falcon])
def test_later_turns_as_if_read_anew(make: Callable[[], PreTrainedModel]) -> None:
    talk = conversation(make())
    for text in ("Hello", "What does a lighthouse do?", "Why"):
        fresh = conversation(make())
        fresh.messages = [dict(message) for message in talk.messages]
        assert "".join(talk.ask(text)) == "".join(fresh.ask(text))
    assert talk.last.reused > 5
    assert fresh.last.reused == 0


def test_a_stopped_answer_is_kept_as_far_as_it_went() -> None:
    talk = conversation()
    pieces = talk.ask("Hello")
    said = next(pieces) + next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert talk.messages[-1] == {"role": "assistant", "content": said.strip()}
    assert talk.last.finish is None
    assert "".join(talk.ask("Go on"))


@pytest.mark.parametrize(("make", "tokens"), [(lambda: build("llama"), 0), (lambda: build("llama"), 1), (falcon, 0)])
def test_interrupted_within_a_forward(
    make: Callable[[], PreTrainedModel], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ctrl-C nearly always comes when the first layers have read a token and the last have not."""
    talk = conversation(make())
    "".join(talk.ask("Hello"))
    before = len(talk.messages)
    pieces = talk.ask("Go on")
    with pytest.raises(KeyboardInterrupt):
        for _ in range(tokens):
            next(pieces)
        with monkeypatch.context() as within:
            within.setattr(last_block(talk.model), "forward", interrupted)
            "".join(pieces)
    assert len(talk.messages) == before + (2 if tokens else 0)
    fresh = conversation(make())
    fresh.messages = [dict(message) for message in talk.messages]
    assert "".join(talk.ask("Why")) == "".join(fresh.ask("Why"))


def last_block(model: PreTrainedModel) -> torch.nn.Module:
    return find_blocks(model)[1][-1]


def interrupted(*arguments: Any, **options: Any) -> Any:
    raise KeyboardInterrupt


def test_old_turns_are_left_out() -> None:
    talk = conversation(context=100)
    talk.system = "Be brief"
    dropped = 0
    for _ in range(8):
        "".join(talk.ask("Tell me more"))
        dropped += talk.last.dropped
    assert dropped > 0
    assert talk.messages[0]["role"] == "user"
    before = list(talk.messages)
    with pytest.raises(SignbitError, match="shorten it"):
        "".join(talk.ask("word " * 500))
    assert talk.messages == before


def test_without_a_template() -> None:
    talk = conversation(template=False)
    assert talk.prompts.stops
    assert "".join(talk.ask("Hello")) is not None


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    file = tmp_path / "talk.json"
    lines = [
        "Hello",
        "",
        f"/save {file}",
        "/nonsense",
        "/help",
        "/save",
        "/save /no/such/place",
        "/system Be kind",
        "/exit",
        "x",
    ]
    talk = conversation()
    Terminal(talk, io.StringIO("\n".join(lines)), out).run("tiny")
    saved = json.loads(file.read_text())
    assert [message["role"] for message in saved] == ["user", "assistant"]
    assert out.getvalue().strip() == saved[1]["content"].strip()
    assert (talk.messages, talk.system) == ([], "Be kind")
    said = capsys.readouterr().err
    for words in ("2 messages in", "no such command", "/reset", "needs the name", "cannot be written"):
        assert words in said


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert printable("a\x1b[2J\x9b\n\té\U0001f469\u200d\U0001f680") == "a\ufffd[2J\ufffd\n\té\U0001f469\u200d\U0001f680"


def test_in_a_pipe(packed_dir: Callable[..., Path]) -> None:
    command = [sys.executable, "-m", "signbit", "chat", str(packed_dir("llama")), "--max-tokens", "5", "--seed", "1"]
    found = subprocess.run(command, input="Hello\nAgain", capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr
    assert "no chat template" in found.stderr
    assert found.stdout.endswith("\n")
    assert "Traceback" not in found.stderr
