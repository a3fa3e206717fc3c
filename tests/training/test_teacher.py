"""States of models, heads, and the teacher's cache."""

import os
import resource
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from signbit import SignbitError
from signbit.architectures import find_blocks
from signbit.journal import Journal
from signbit.precision import autocast
from signbit.processes import Processes
from signbit.progress import Silent
from signbit.recipe import Recipe
from signbit.training import teacher as teaching
from signbit.training.arguments import Run
from signbit.training.options import TrainingOptions
from signbit.training.run import _teacher
from signbit.training.states import Head, States, StatesOf
from signbit.training.teacher import Cache, Teacher
from tiny import CONFIGS, VOCAB, build, tokenizer

IDS = torch.randint(3, 300, (4, 12), generator=torch.Generator().manual_seed(0))


def states_of(family: str) -> StatesOf:
    model = build(family)
    return StatesOf(model, find_blocks(model)[0], hidden=True)


@pytest.mark.parametrize("family", sorted(CONFIGS))
@torch.no_grad()
def test_states_and_head_are_the_model_s(family: str) -> None:
    states = states_of(family)
    hidden, last = states(IDS)
    found = states.model(IDS, output_hidden_states=True, use_cache=False)
    torch.testing.assert_close(Head(states.model, torch.float32)(last), found.logits, rtol=1e-4, atol=1e-5)
    assert len(hidden) == len(found.hidden_states) - 2
    for one, wanted in zip(hidden, found.hidden_states[1:-1], strict=True):
        torch.testing.assert_close(one, wanted)
    Head(states.model, torch.float32).check(states, IDS[:1])


def test_logits_that_are_more_than_a_product_are_found_out() -> None:
    states = states_of("gemma2")
    states.model.config.final_logit_softcapping = None
    head = Head(states.model, torch.float32)
    states.model.config.final_logit_softcapping = 0.1
    with pytest.raises(SignbitError, match="Gemma2ForCausalLM does more to its logits"):
        head.check(states, IDS[:1])


def test_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = build("llama")
        states = StatesOf(model, find_blocks(model)[0], hidden=True, checkpointing=checkpointing)
        hidden, last = states(IDS)
        assert len(hidden) == 1
        (last.square().sum() + hidden[0].square().sum()).backward()
        gradients.append(model.model.layers[0].mlp.up_proj.weight.grad)
    assert torch.equal(*gradients)


def test_logits_that_are_no_numbers_are_named() -> None:
    states = states_of("llama")
    states.model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(SignbitError, match=r"LlamaForCausalLM has logits that are NaN or infinite.*start anew"):
        Head(states.model, torch.float32).check(states, IDS[:1])


@torch.no_grad()
def test_a_teacher_in_bfloat16_knows_late_positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frequencies of rotary positions are not rounded: they are what the phase of position 2000 is made of."""
    config = CONFIGS["llama"]()
    config.max_position_embeddings = 2048
    monkeypatch.setitem(CONFIGS, "long", lambda: config)
    model = build("long")
    for block in model.model.layers:
        # Attention that looks at places.
        block.self_attn.q_proj.weight *= 2
        block.self_attn.k_proj.weight *= 2
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    options = TrainingOptions(precision="bfloat16")
    recipe, journal = Recipe({"method": "onebit", "samples": 0}), Journal(tmp_path / "out")
    run = Run(str(tmp_path / "model"), tmp_path / "out", recipe, options, journal, Processes("cpu"), Silent(), False)
    teacher = _teacher(run, None, "model.layers", torch.bfloat16)  # type: ignore[arg-type]
    ids = torch.randint(3, VOCAB, (1, 2048), generator=torch.Generator().manual_seed(0))
    found = teacher.head(teacher.states([0], ids).last).log_softmax(-1)[0]  # type: ignore[arg-type]
    wanted = model(ids).logits.log_softmax(-1)[0]
    divergence = (wanted.exp() * (wanted - found)).sum(-1)
    assert divergence[1024:].mean() < 0.01  # with rounded frequencies 0.15


class TestCache:
    @pytest.fixture
    def teacher(self, tmp_path: Path) -> Teacher:
        return self.open(tmp_path)

    def open(self, directory: Path, *, last: bool = True) -> Teacher:
        states = states_of("llama")
        with torch.no_grad():
            hidden, final = states(IDS[:1])
        cache = Cache(directory, 10, States(hidden, final if last else None), IDS.shape[1])
        return Teacher(states, Head(states.model, torch.float32), autocast("float32", torch.device("cpu")), cache)

    def test_what_is_looked_up_is_what_was_computed(self, teacher: Teacher, tmp_path: Path) -> None:
        first = teacher.states([7, 2, 0, 1], IDS)
        hidden, last = states_of("llama")(IDS)
        assert first.last is not None
        torch.testing.assert_close(first.last, last)
        torch.testing.assert_close(first.hidden[0].float(), F.normalize(hidden[0], dim=-1), rtol=1e-3, atol=1e-4)
        again = self.open(tmp_path)
        again._compute = None  # type: ignore[assignment,method-assign]
        self.same(again.states([7, 2, 0, 1], IDS), first)
        self.same(again.states([0, 7], IDS[[2, 0]]), States([first.hidden[0][[2, 0]]], first.last[[2, 0]]))

    def same(self, found: States, wanted: States) -> None:
        assert found.last is not None
        assert wanted.last is not None
        assert torch.equal(found.last, wanted.last)
        assert torch.equal(found.hidden[0], wanted.hidden[0])

    @pytest.mark.parametrize("file", ["teacher.bin", "teacher.sums"])
    def test_a_record_that_is_half_there_is_computed_again(self, file: str, teacher: Teacher, tmp_path: Path) -> None:
        first = teacher.states([0, 1, 2, 3], IDS)
        size = os.path.getsize(tmp_path / file)
        with (tmp_path / file).open("r+b") as stream:  # of the second window
            stream.seek(size // 10 + size // 20)
            stream.write(b"\x00" * (size // 40))
        self.same(self.open(tmp_path).states([0, 1, 2, 3], IDS), first)

    def test_only_what_the_losses_need(self, tmp_path: Path) -> None:
        teacher = self.open(tmp_path, last=False)
        assert teacher.states([3], IDS[:1]).last is None
        assert os.path.getsize(tmp_path / "teacher.bin") == 10 * 12 * 72 * 2

    def test_a_disk_that_is_full_is_an_error_and_not_the_end_of_the_process(
        self, teacher: Teacher, tmp_path: Path
    ) -> None:
        """As a limit on the size of files, which is refused in the same way."""
        limit, sizes = resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE)
        assert teacher.states([0], IDS[:1]).last is not None
        resource.setrlimit(limit, (os.path.getsize(tmp_path / "teacher.bin") // 2, sizes[1]))
        try:
            with pytest.raises(OSError, match="too large"):
                teacher.states([9], IDS[:1])
        finally:
            resource.setrlimit(limit, sizes)
        self.same(self.open(tmp_path).states([9], IDS[:1]), teacher.states([9], IDS[:1]))

    def test_room_on_the_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = teaching.shutil._ntuple_diskusage(10, 10, 0)  # type: ignore[attr-defined]
        monkeypatch.setattr(teaching.shutil, "disk_usage", lambda _: usage)  # type: ignore[attr-defined]
        with pytest.raises(SignbitError, match=r"teacher_cache takes .* GB more.*teacher_cache=false"):
            self.open(tmp_path)
