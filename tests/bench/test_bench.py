"""What benchmarks report holds together; how fast anything is, is no business of tests."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

import signbit
from signbit import SignbitError
from signbit.bench import MAKERS, bench_decode, bench_gpu, bench_kernels, tables
from signbit.bench.memory import memory
from signbit.bench.timing import Contestant, take_turns, times_faster
from signbit.cli import main


@pytest.mark.parametrize("name", MAKERS)
def test_random_matrices_are_sound(name: str) -> None:
    layout = MAKERS[name](48, 256)
    assert layout.shape == (48, 256)
    layout.check(name)
    assert 0.1 < (torch.randn(16, 256) @ layout.dequantize().T).std() < 10  # products stay in range


def test_contestants_take_turns_through_all_their_memory() -> None:
    called: list[tuple[str, int]] = []
    pair = [Contestant(name, [partial(called.append, (name, i)) for i in range(3)]) for name in "ab"]
    take_turns(pair, turns=4, at_least=0.0)
    assert called[:4] == [("a", 0), ("b", 0), ("a", 0), ("a", 1)]  # one to begin with, one to see how long it takes
    assert set(called) == {(name, i) for name in "ab" for i in range(3)}
    assert [len(one.seconds) for one in pair] == [4, 4]
    pair[0].seconds, pair[1].seconds = [1.0, 2.0, 1.0], [2.0, 4.0, 30.0]
    assert times_faster(pair[0], pair[1]) == 2


def test_bench_kernels() -> None:
    quick = {"turns": 2, "seconds": 1e-4, "footprint": 1 << 20}
    result = bench_kernels(names=["sign", "pb-llm"], shapes=[(40, 64)], batches=[1, 3], **quick)  # type: ignore[arg-type]
    rows = result["products"]
    assert [(row["matrix"], row["batch"], row["activations"]) for row in rows] == [
        (name, batch, mode) for name in ("sign", "pb-llm") for batch in (1, 3) for mode in ("exact", "int8")
    ]
    assert all(row["error"] < (1e-5 if row["activations"] == "exact" else 0.02) for row in rows)
    assert rows[0]["bits_per_weight"] == pytest.approx(1 + 16 / 64)
    assert result["threads"] == torch.get_num_threads()
    assert len(tables.kernel_tables(result)[0].rows) == len(rows)
    json.dumps(result, allow_nan=False)


def test_bench_kernels_refuses_what_it_does_not_know() -> None:
    with pytest.raises(SignbitError, match="no kind of matrix is called 'sing'"):
        bench_kernels(names=["sing"])
    assert main(["bench", "kernels", "--shape", "4096"]) == 2
    assert main(["bench", "kernels", "--shape", "0x8"]) == 2


def test_bench_gpu_as_far_as_a_cpu_goes() -> None:
    options = {"device": "cpu", "shapes": [(48, 64)], "batches": [1, 9], "turns": 2, "footprint": 1 << 16}
    result = bench_gpu(names=["sign", "pb-llm"], **options)  # type: ignore[arg-type]
    rows = result["products"]
    assert [(row["matrix"], row["batch"]) for row in rows] == [(n, b) for n in ("sign", "pb-llm") for b in (1, 9)]
    assert all(row["error"] < 0.01 and row["share_of_copy"] > 0 for row in rows)
    assert len(tables.gpu_table(result).rows) == len(rows)
    json.dumps(result, allow_nan=False)


def test_bench_kernels_on_a_gpu_that_is_not_there() -> None:
    if not torch.cuda.is_available():
        assert main(["bench", "kernels", "--device", "cuda"]) == 2
    assert main(["bench", "kernels", "--tune"]) == 2
    assert main(["bench", "kernels", "--device", "cuda", "--switch-over"]) == 2


def test_bench_decode(
    packed_dir: Callable[..., Path], tiny_dir: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    packed, original = str(packed_dir("llama")), str(tiny_dir("llama"))
    options = ["--tokens", "3", "--prompt-tokens", "4", "--activations", "int8", "--against", original, "--json", "-"]
    assert main(["bench", "decode", packed, *options]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert result["tokens_per_second"] == pytest.approx(1 / result["seconds_per_token"])
    assert 0 < result["kernel_share"] <= 1
    assert result["tokens"] == 3 * 2  # three turns; the first token of each is the prompt's
    assert result["against"]["model"] == original
    assert "tokens per second" in printed.err
    if result["memory"] is not None:
        stored = signbit.inspect(packed)["bytes"]["total"]
        assert result["memory"]["checkpoint"] == stored


def test_bench_decode_of_a_model_that_is_not_packed(tiny_dir: Callable[..., Path]) -> None:
    result = bench_decode(str(tiny_dir("llama")), tokens=2, prompt_tokens=2)
    assert result["kernel_share"] is None
    assert tables.decode_tables(result)
    with pytest.raises(SignbitError, match="tokens"):
        bench_decode(str(tiny_dir("llama")), tokens=1)


def test_memory_is_told_apart() -> None:
    before = memory()
    if before is None:
        pytest.skip("this system does not tell")
    held = torch.ones(64 << 20, dtype=torch.uint8)
    after = memory()
    assert after is not None
    assert after.anonymous - before.anonymous > 0.9 * held.nbytes
    assert after.resident >= after.anonymous
