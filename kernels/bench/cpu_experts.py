"""CPU experts at Kimi-K2.6's real shapes, against what the machine can read and multiply; and loading against reading.

    python kernels/bench/cpu_experts.py            a table, about two minutes, 3 GB of memory
    python kernels/bench/cpu_experts.py --save     and a JSON file in kernels/bench/results

Each figure is the best of several runs. `of read` is the bytes of the touched experts, each counted once, over the time,
as a share of the read bandwidth measured in the same run; `of bf16` is the arithmetic as a share of torch's dense
bfloat16 product at the same number of rows; the error is ‖out − ref‖ / ‖ref‖ against float32.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from k26_plugins.common.checkpoint import Checkpoint, expert_name
from k26_plugins.common.experts import ExpertWeights, create_experts, reference_experts
from k26_plugins.common.tiny import TinySizes, make_tiny

HIDDEN, INNER, EXPERTS, TOP_K = 7168, 2048, 16, 8
TOKENS = (1, 4, 16, 64, 512)
EXPERT_BYTES = 3 * HIDDEN * INNER // 2 + 3 * HIDDEN * INNER // 32 * 2


def best(run: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of the fastest of several runs, after one that warms up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def read_bandwidth() -> float:
    """Bytes a second of summing 1 GiB, far larger than the caches."""
    data = torch.ones(2**27, dtype=torch.int64)
    return data.nbytes / best(data.sum)


def matmul_rate(rows: int) -> float:
    """Floating-point operations a second of a dense bfloat16 product with an expert's first matrix."""
    weight = torch.randn(HIDDEN, 2 * INNER).to(torch.bfloat16)
    x = torch.randn(rows, HIDDEN).to(torch.bfloat16)
    return 2 * rows * HIDDEN * 2 * INNER / best(lambda: x @ weight)


def load(checkpoint: Checkpoint) -> ExpertWeights:
    """The experts of layer 1, stacked as an engine stacks them."""
    parts: dict[str, list[torch.Tensor]] = {"13packed": [], "13scale": [], "2packed": [], "2scale": []}
    for expert in range(EXPERTS):
        for part in ("packed", "scale"):
            gate, up, down = (checkpoint.tensor(expert_name(1, expert, name, part)) for name in ("gate", "up", "down"))
            parts[f"13{part}"].append(torch.cat((gate, up)))
            parts[f"2{part}"].append(down)
    return ExpertWeights(*(torch.stack(parts.pop(name)) for name in list(parts)))


def measure(console: Console) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "checkpoint"
        with console.status(f"making a layer of {EXPERTS} experts"):
            make_tiny(folder, TinySizes(layers=2, hidden_size=HIDDEN, moe_intermediate_size=INNER, experts=EXPERTS))
        files = sorted(folder.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        reading = best(lambda: [file.read_bytes() for file in files], 3)
        loading = best(lambda: load(Checkpoint(folder)), 3)
        original = load(Checkpoint(folder))
        start = time.perf_counter()
        experts = create_experts(original.copy_of(list(range(EXPERTS))), "cpu")
        repacking = time.perf_counter() - start
    bandwidth = read_bandwidth()
    rows: list[dict[str, float]] = []
    generator = torch.Generator().manual_seed(0)
    for count in track(TOKENS, "measuring", console=console):
        x = torch.randn(count, HIDDEN, generator=generator).to(torch.bfloat16)
        ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(count)])
        weights = torch.rand(count, TOP_K, generator=generator)
        seconds = best(lambda x=x, ids=ids, weights=weights: experts.apply(x, ids, weights))
        expected = reference_experts(x.float(), ids, weights, original.expert, EXPERTS)
        error = ((experts.apply(x, ids, weights).float() - expected).norm() / expected.norm()).item()
        touched = len(ids.unique())
        flops = 2 * count * TOP_K * 3 * HIDDEN * INNER
        per_expert = max(1, count * TOP_K // touched)
        rows.append(
            {
                "tokens": count,
                "milliseconds": seconds * 1e3,
                "gigabytes_per_second": touched * EXPERT_BYTES / seconds / 1e9,
                "of_read": touched * EXPERT_BYTES / seconds / bandwidth,
                "gigaflops": flops / seconds / 1e9,
                "of_bf16": flops / seconds / matmul_rate(per_expert),
                "error": error,
            }
        )
    return {
        "read_bandwidth_gigabytes_per_second": bandwidth / 1e9,
        "matmul_gigaflops_at_256_rows": matmul_rate(256) / 1e9,
        "file_bytes": size,
        "reading_files_seconds": reading,
        "stacking_experts_seconds": loading,
        "repacking_and_self_test_seconds": repacking,
        "rows": rows,
    }


def machine() -> dict[str, object]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "date": date.today().isoformat(),
        "cpu": model,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write the results beside this file, named by date and CPU")
    arguments = parser.parse_args()
    console = Console()
    result = {"machine": machine(), **measure(console)}
    table = Table("tokens", "ms", "GB/s", "of read", "GFLOP/s", "of bf16", "error", title=str(result["machine"]))
    for row in result["rows"]:  # type: ignore[attr-defined]
        table.add_row(
            f"{row['tokens']}",
            f"{row['milliseconds']:.1f}",
            f"{row['gigabytes_per_second']:.1f}",
            f"{row['of_read']:.0%}",
            f"{row['gigaflops']:.0f}",
            f"{row['of_bf16']:.0%}",
            f"{row['error']:.1e}",
        )
    console.print(table)
    console.print({name: value for name, value in result.items() if name not in ("machine", "rows")})
    if arguments.save:
        info = result["machine"]
        name = f"cpu_experts-{info['date']}-{str(info['cpu']).replace(' ', '_')}-{info['threads']}t.json"  # type: ignore[index]
        file = Path(__file__).parent / "results" / name
        file.write_text(json.dumps(result, indent=2) + "\n")
        console.print(f"saved {file}")


if __name__ == "__main__":
    main()
