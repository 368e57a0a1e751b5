"""Time CPU experts at Kimi-K2.6's real shapes and their loading, and compare both with the machine's limits.

    python kernels/bench/cpu_experts.py            a table, about three minutes, 4 GB of memory
    python kernels/bench/cpu_experts.py --save     and a JSON file in kernels/bench/results
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 python …
                                                   AVX2 on a CPU with AVX512, for torch's GEMM too

The core's backends and, if it is installed, kt-kernel's RAWINT4 are timed in turns on the same weights. Each figure is
the best of several turns. `of read` is the rate at which the bytes of the touched experts are read, each expert counted
once, as a share of the bandwidth at which torch sums the first backend's weights in the same turns. `of dense` is the
rate of arithmetic as a share of that of torch's dense GEMM with the same number of rows, in the dtype in which the CPU
is fast. The error is ‖out − ref‖ / ‖ref‖ against float32. A backend that would take over 5 s for a batch is left out
for this batch.

On a machine that others use, their work decides the figures unless this program has priority:
`setsid -w bash -c 'echo -20 > /proc/self/autogroup; exec nice -n -20 python …'`. A real-time priority does not help,
because kt-kernel's waiting threads would then keep its working threads from running.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
from bench.kept import keep, machine
from rich.console import Console
from rich.progress import track
from rich.table import Table

from k26_plugins.common.checkpoint import Checkpoint, expert_name
from k26_plugins.common.experts import ExpertsBackend, ExpertsError, ExpertWeights, create_experts, reference_experts
from k26_plugins.common.experts.native.threads import process_threads
from k26_plugins.common.model.linear import multiplies_bfloat16
from k26_plugins.common.tiny.checkpoint import TinySizes, make_tiny

HIDDEN_SIZE, INTERMEDIATE_SIZE, EXPERTS, TOP_K = 7168, 2048, 16, 8
TOKENS = (1, 4, 16, 64, 512)
SECONDS_EACH = 10  # for each number of tokens; no turn begins after them
LONGEST = 5  # seconds that a batch may take
CHECKED = 64  # tokens of a batch whose result is compared with the reference
EXPERT_BYTES = 3 * HIDDEN_SIZE * INTERMEDIATE_SIZE // 2 + 3 * HIDDEN_SIZE * INTERMEDIATE_SIZE // 32 * 2


def best(run: Callable[[], object], repeats: int = 5) -> float:
    """Return the seconds of the fastest of several runs, after one that warms up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def in_turns(runs: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Return the seconds of each function's fastest turn, after one that warms up.

    There are fewer turns if they take longer than SECONDS_EACH.
    """
    fastest = dict.fromkeys(runs, float("inf"))
    began = time.perf_counter()
    for turn in range(turns + 1):
        for name, run in runs.items():
            # The threads of the function before spin for a while after it has ended.
            time.sleep(0.05)
            start = time.perf_counter()
            run()
            if turn:
                fastest[name] = min(fastest[name], time.perf_counter() - start)
        if turn and time.perf_counter() - began > SECONDS_EACH:
            break
    return fastest


def load(checkpoint: Checkpoint) -> ExpertWeights:
    """Return the experts of layer 1, stacked as an engine stacks them."""
    parts: dict[str, list[torch.Tensor]] = {"13packed": [], "13scale": [], "2packed": [], "2scale": []}
    for expert in range(EXPERTS):
        for part in ("packed", "scale"):
            gate, up, down = (checkpoint.tensor(expert_name(1, expert, name, part)) for name in ("gate", "up", "down"))
            parts[f"13{part}"].append(torch.cat((gate, up)))
            parts[f"2{part}"].append(down)
    return ExpertWeights(*(torch.stack(parts.pop(name)) for name in list(parts)))


def measure(console: Console) -> dict[str, object]:
    """Make a layer of experts, measure it, and return the figures."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "checkpoint"
        with console.status(f"making a layer of {EXPERTS} experts"):
            sizes = {"hidden_size": HIDDEN_SIZE, "moe_intermediate_size": INTERMEDIATE_SIZE, "experts": EXPERTS}
            make_tiny(folder, TinySizes(layers=2, **sizes))
        files = sorted(folder.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        reading = best(lambda: [file.read_bytes() for file in files], 3)
        loading = best(lambda: load(Checkpoint(folder)), 3)
        original = load(Checkpoint(folder))
    experts, repacking = prepare(original, console)
    streamed = next(iter(experts.values())).tensors()["w13_packed"].view(torch.int64)
    dtype = torch.bfloat16 if multiplies_bfloat16() else torch.float32
    weight = torch.randn(HIDDEN_SIZE, 2 * INTERMEDIATE_SIZE).to(dtype)
    rows: list[dict[str, object]] = []
    each: dict[str, float] = dict.fromkeys(experts, 0.0)  # seconds of a token, as last measured
    generator = torch.Generator().manual_seed(0)
    for count in track(TOKENS, "measuring", console=console):
        x = torch.randn(count, HIDDEN_SIZE, generator=generator).to(torch.bfloat16)
        ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(count)])
        weights = torch.rand(count, TOP_K, generator=generator)
        first = (x[:CHECKED], ids[:CHECKED], weights[:CHECKED])
        expected = reference_experts(first[0].float(), *first[1:], original.expert, EXPERTS)
        touched = len(ids.unique())
        per_expert = torch.randn(max(1, count * TOP_K // touched), HIDDEN_SIZE).to(dtype)
        runs: dict[str, Callable[[], object]] = {
            name: partial(backend.apply, x, ids, weights)
            for name, backend in experts.items()
            if each[name] * count <= LONGEST
        }
        runs["read"] = streamed.sum
        runs["dense"] = partial(torch.matmul, per_expert, weight)
        seconds = in_turns(runs, max(5, 40 // count))
        bandwidth = streamed.nbytes / seconds["read"]
        rate = 2 * len(per_expert) * weight.numel() / seconds["dense"]
        flops = 2 * count * TOP_K * 3 * HIDDEN_SIZE * INTERMEDIATE_SIZE
        for name in [name for name in experts if name in runs]:
            each[name] = seconds[name] / count
            error = ((experts[name].apply(*first).float() - expected).norm() / expected.norm()).item()
            rows.append(
                {
                    "backend": name,
                    "tokens": count,
                    "milliseconds": seconds[name] * 1e3,
                    "gigabytes_per_second": touched * EXPERT_BYTES / seconds[name] / 1e9,
                    "of_read": touched * EXPERT_BYTES / seconds[name] / bandwidth,
                    "gigaflops": flops / seconds[name] / 1e9,
                    "of_dense": flops / seconds[name] / rate,
                    "read_gigabytes_per_second": bandwidth / 1e9,
                    "dense_gigaflops": rate / 1e9,
                    "error": error,
                }
            )
    kt: Any = experts.get("kt")
    return {
        "instruction_sets": {
            "native": process_threads().instruction_set if "native" in experts else "none",
            "kt": type(kt.moe).__name__ if kt is not None else "none",
            "dense": str(dtype),
        },
        "file_bytes": size,
        "reading_files_seconds": reading,
        "stacking_experts_seconds": loading,
        "repacking_and_self_test_seconds": repacking,
        "rows": rows,
    }


def prepare(original: ExpertWeights, console: Console) -> tuple[dict[str, ExpertsBackend], dict[str, float]]:
    """Return the backends that can run here, each with its own copy of the weights, and the seconds to make each."""
    experts: dict[str, ExpertsBackend] = {}
    seconds: dict[str, float] = {}
    for name in ("native", "cpu", "kt"):
        copy = original.copy_of(list(range(EXPERTS)))
        start = time.perf_counter()
        try:
            experts[name] = create_experts(copy, name)
        except ExpertsError as error:
            console.print(f"without {name}: {error}")
        seconds[name] = time.perf_counter() - start
    return experts, seconds


def libraries() -> dict[str, object]:
    """Return what the figures depend on besides the machine: threads, instruction set and versions."""
    try:
        kt_kernel = version("kt-kernel")
    except PackageNotFoundError:
        kt_kernel = "none"
    capability = torch.backends.cpu.get_cpu_capability()
    found = {"threads": torch.get_num_threads(), "capability": capability}
    return {**found, "torch": torch.__version__, "kt-kernel": kt_kernel}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write the results, in a file named by date and CPU")
    arguments = parser.parse_args()
    console = Console()
    result: dict[str, Any] = {"machine": {**machine(), **libraries()}, **measure(console)}
    table = Table(
        "tokens", "backend", "ms", "GB/s", "of read", "GFLOP/s", "of dense", "error", title=str(result["machine"])
    )
    for row in result["rows"]:
        table.add_row(
            f"{row['tokens']}",
            row["backend"],
            f"{row['milliseconds']:.1f}",
            f"{row['gigabytes_per_second']:.1f}",
            f"{row['of_read']:.0%}",
            f"{row['gigaflops']:.0f}",
            f"{row['of_dense']:.0%}",
            f"{row['error']:.1e}",
        )
    console.print(table)
    console.print({name: value for name, value in result.items() if name not in ("machine", "rows")})
    if arguments.save:
        keep("cpu_experts", result, result["machine"]["capability"])


if __name__ == "__main__":
    main()
