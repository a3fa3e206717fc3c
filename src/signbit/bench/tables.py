"""The results of benchmarks as tables for people."""

from __future__ import annotations

from typing import Any

from rich.table import Table


def kernel_tables(result: dict[str, Any]) -> list[Table]:
    stream = [row["stream_gigabytes_per_second"] for row in result["products"]]
    title = f"{_machine(result)}, streaming read {min(stream):.1f} to {max(stream):.1f} GB/s"
    table = _table(
        title, "matrix", "shape", "batch", "activations", "bits", "us", "Gweights/s", "GB/s", "of stream", "x bf16",
        "x fp32", "error",
    )  # fmt: skip
    for row in result["products"]:
        table.add_row(
            row["matrix"] if row["kernel"] else f"{row['matrix']} (torch)",
            "x".join(map(str, row["shape"])),
            str(row["batch"]),
            row["activations"],
            f"{row['bits_per_weight']:.2f}",
            f"{row['microseconds']:,.0f}",
            f"{row['weights_per_second'] / 1e9:.1f}",
            f"{row['gigabytes_per_second']:.1f}",
            f"{row['share_of_stream']:.0%}",
            f"{row['times_faster_than_bf16']:.1f}",
            f"{row['times_faster_than_fp32']:.1f}",
            f"{row['error']:.1e}",
        )
    return [table, *([_switch_table(result["switch_over"])] if result["switch_over"] else [])]


def gpu_table(result: dict[str, Any]) -> Table:
    title = f"{result['device']}, copies {result['copy_gigabytes_per_second']:,.0f} GB/s (reads and writes)"
    names = "matrix", "shape", "batch", "bits", "us", "GB/s", "of copy", "TFLOPS", "x bf16", "error"
    table = _table(title, *names)
    for row in result["products"]:
        table.add_row(
            row["matrix"],
            "x".join(map(str, row["shape"])),
            str(row["batch"]),
            f"{row['bits_per_weight']:.2f}",
            f"{row['microseconds']:,.1f}",
            f"{row['gigabytes_per_second']:,.1f}",
            f"{row['share_of_copy']:.0%}",
            f"{row['teraflops']:.1f}",
            f"{row['times_faster_than_bf16']:.2f}",
            f"{row['error']:.1e}",
        )
    return table


def _switch_table(crossings: list[dict[str, Any]]) -> Table:
    batches = [str(one["batch"]) for one in crossings[0]["batches"]]
    title = "how many times faster packed products are than unpacking tiles for dense ones, by batch"
    table = _table(title, "matrix", "shape", *batches, "unpack from")
    for crossing in crossings:
        ratios = (f"{one['ratio']:.2f}" for one in crossing["batches"])
        first = crossing["unpacked_is_faster_from"]
        table.add_row(crossing["matrix"], "x".join(map(str, crossing["shape"])), *ratios, str(first or "never"))
    return table


def decode_tables(result: dict[str, Any]) -> list[Table]:
    table = _table(f"decoding at batch 1, {_machine(result)}", "", "")
    table.show_header = False
    rows = {
        "tokens per second": f"{result['tokens_per_second']:.1f}",
        f"first token, after {result['prompt_tokens']} of the prompt": f"{result['seconds_to_first_token']:.2f} s",
        "activations": result["activations"],
        "ready after": f"{result['seconds_to_load']:.1f} s",
    }
    if result["kernel_share"] is not None:
        rows["of a token, in packed linears"] = f"{result['kernel_share']:.0%}"
    if result["memory"] is not None:
        memory = result["memory"]
        rows |= {
            "checkpoint": _mega(memory["checkpoint"]),
            "key-value cache": _mega(memory["cache"]),
            "resident before loading": _mega(memory["before"]["resident"]),
            "resident after decoding": _parts(memory["decoded"]),
            "resident, without cache": f"{memory['resident_to_checkpoint']:.2f} x checkpoint, "
            f"{memory['model_to_checkpoint']:.2f} x without what was there before loading",
        }
    if "against" in result:
        against = result["against"]
        rows[f"{against['model']}, tokens per second"] = f"{against['tokens_per_second']:.1f}"
        rows["times faster"] = f"{result['times_faster']:.2f}"
    for name, value in rows.items():
        table.add_row(name, value)
    return [table]


def _machine(result: dict[str, Any]) -> str:
    instructions = result["instruction_set"]
    kernels = f"{instructions} kernels" if instructions else "no kernels: torch"
    threads = result["threads"]
    return f"{kernels}, {threads} thread{'s' if threads > 1 else ''}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def _mega(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


def _parts(memory: dict[str, int]) -> str:
    return f"{_mega(memory['resident'])}: {_mega(memory['anonymous'])} anonymous, {_mega(memory['files'])} mapped files"
