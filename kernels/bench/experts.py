"""Time the fused experts on a GPU, and compare them with peers and with the GPU's limits, in under eight minutes.

    cd kernels && python -m bench.experts              a table, a roofline plot and a JSON file in bench/results
    cd kernels && python -m bench.experts --layers tp8 --tokens 1,64 --no-save

Each time is that of a CUDA graph over several batches that choose different experts, so that no weight is left in a
cache. `of copy` is the rate at which the bytes of the touched experts are read, each expert counted once, as a share of
the GPU's copy bandwidth. `of matmul` is the rate of arithmetic as a share of that of a dense bfloat16 GEMM. Copy
bandwidth and GEMM rate are measured first, in the same run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import triton
from bench.dense import WAITS_FOR_DEVICE, dequantize_and_dense
from bench.layers import LAYERS, TOKENS
from k26_kernels import KernelExperts, fused_experts

from k26_plugins.common.experts.base import ExpertWeights
from k26_plugins.common.experts.peer import NotHereError, Run
from k26_plugins.operate.tune.clock import Clock, clock_of
from k26_plugins.operate.tune.measure import random_weights
from k26_plugins.operate.tune.routing import Batch, Layer
from k26_plugins.vllm.peers import PEERS

RESULTS = Path(__file__).parent / "results"
ROUTINGS = ("uniform", "zipf", "prefix")
OURS = "k26"
BUDGET_SECONDS = 450


@dataclass(frozen=True)
class Row:
    """The figures of one implementation on one batch. If it did not run, they are None and `note` says why."""

    layer: str
    routing: str
    tokens: int
    name: str
    microseconds: float | None = None
    of_copy: float | None = None
    of_matmul: float | None = None
    difference: float | None = None
    """‖peer − ours‖ / ‖ours‖."""
    note: str = ""


def copy_bandwidth(clock: Clock) -> float:
    """Return the bytes a second, read and written, at which the GPU copies 4 GiB."""
    source = torch.empty(2**32, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / clock(lambda: target.copy_(source), False)


def matmul_rate(clock: Clock) -> float:
    """Return the floating-point operations a second of a dense bfloat16 GEMM of random matrices."""
    x, y = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / clock(lambda: x @ y, False)


def measure(
    layer: Layer,
    routing: str,
    tokens: int,
    runs: dict[str, Run | str],
    rates: tuple[float, float],
    device: torch.device,
    clock: Clock,
) -> Iterator[Row]:
    """Yield a row for each implementation on a batch of `tokens` tokens.

    runs: implementations by name; a string in place of one says why it does not run. rates: copy bandwidth and GEMM
    rate.
    """
    local = layer.expert_map(device)
    data = layer.batches(routing, tokens, device)
    here = [layer.pairs_here(batch.topk_ids.cpu()) for batch in data]

    def call(run: Run, batch: Batch) -> torch.Tensor:
        return run(batch.hidden_states, batch.topk_weights, batch.topk_ids, local)

    def call_all(run: Run) -> None:
        for batch in data:
            call(run, batch)

    size = sum(len(pairs.unique()) for pairs in here) * layer.expert_bytes
    flops = sum(layer.flops(len(pairs)) for pairs in here)
    ours: torch.Tensor | None = None
    for name, run in runs.items():
        if isinstance(run, str):
            yield Row(layer.name, routing, tokens, name, note=run)
            continue
        try:
            result = call(run, data[0]).float()
            ours = result if ours is None else ours
            seconds = clock(partial(call_all, run), name != WAITS_FOR_DEVICE)
        except Exception as error:  # a peer may fail in any way; its row then says so
            if name == OURS:
                raise
            yield Row(layer.name, routing, tokens, name, note=f"{type(error).__name__}: {error}"[:120])
            continue
        yield Row(
            layer.name,
            routing,
            tokens,
            name,
            microseconds=seconds / len(data) * 1e6,
            of_copy=size / seconds / rates[0],
            of_matmul=flops / seconds / rates[1],
            difference=((result - ours).norm() / ours.norm().clamp(min=1e-30)).item(),
        )


def prepare(weights: ExpertWeights) -> dict[str, Run | str]:
    """Return the implementations by name, the core's first. Each has its own copy of the weights.

    A peer that cannot be made has a string in its place that says why.
    """
    runs: dict[str, Run | str] = {}
    for name, peer in {**PEERS, WAITS_FOR_DEVICE: dequantize_and_dense}.items():
        try:
            runs[name] = peer(weights)
        except NotHereError as reason:
            runs[name] = str(reason)
        except Exception as error:  # an installed peer of another version, or another GPU than it was made for
            runs[name] = f"{type(error).__name__}: {error}"[:120]
    experts = KernelExperts.from_checkpoint(*(tensor.clone() for tensor in weights.parts()))
    return {
        OURS: lambda x, weights, ids, local: fused_experts(x, experts, ids, weights, expert_map=local),
        **runs,
    }


def machine() -> dict[str, str]:
    """Return what the figures depend on: date, GPU, driver, versions and commit."""

    def output(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        except OSError:
            return "unknown"

    return {
        "date": date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "triton": triton.__version__,
        "torch": torch.__version__,
        "commit": output("git", "rev-parse", "--short", "HEAD"),
    }


def line(row: Row) -> str:
    """Return a row as a line of the table."""
    start = f"{row.layer:6} {row.routing:8} {row.tokens:6} {row.name:22}"
    if row.microseconds is None:
        return f"{start} {row.note}"
    return (
        f"{start} {row.microseconds:10.1f} µs {row.of_copy:5.0%} of copy {row.of_matmul:5.0%} of matmul "
        f"differs {row.difference:.1e}"
    )


def plot(rows: list[Row], rates: tuple[float, float], title: str, file: Path) -> None:
    """Draw into `file` the arithmetic rate over operations a byte, below the roofs of copy bandwidth and GEMM rate."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6))
    intensity = [2.0**power for power in range(-1, 13)]
    axes.plot(
        intensity, [min(rates[1], rates[0] * x) / 1e12 for x in intensity], "k-", label="copy and matmul, measured"
    )
    for name in dict.fromkeys(row.name for row in rows):
        points = [
            (row.of_matmul * rates[1], row.of_copy * rates[0])
            for row in rows
            if row.name == name and row.microseconds and row.of_copy and row.of_matmul and row.routing == "uniform"
        ]
        axes.plot([flops / size for flops, size in points], [flops / 1e12 for flops, _ in points], "o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="operations a byte of weights", ylabel="TFLOP/s", title=title)
    axes.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default=",".join(LAYERS), help="of whole, tp8, ep8")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--no-save", action="store_true")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the JSON file and the plot go")
    parser.add_argument("--seconds", type=int, default=BUDGET_SECONDS, help="begin no batch later than this")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench.experts needs a GPU and finds none. Its cost model: python -m bench.cost_model")
    started, device = time.monotonic(), torch.device("cuda")
    clock = clock_of(device)
    rates, info = (copy_bandwidth(clock), matmul_rate(clock)), machine()
    torch.cuda.empty_cache()
    print(info, f"copy {rates[0] / 1e12:.2f} TB/s, matmul {rates[1] / 1e12:.0f} TFLOP/s", flush=True)
    rows: list[Row] = []
    for name in arguments.layers.split(","):
        layer = LAYERS[name]
        runs = prepare(random_weights(layer, device))
        for routing in ROUTINGS:
            for tokens in map(int, arguments.tokens.split(",")):
                if routing == "prefix" and tokens < 300:
                    continue
                if time.monotonic() - started > arguments.seconds:
                    rows.append(Row(name, routing, tokens, OURS, note="not run: the time was used up"))
                    continue
                for row in measure(layer, routing, tokens, runs, rates, device, clock):
                    rows.append(row)
                    print(line(row), flush=True)
        del runs
        torch.cuda.empty_cache()
    if not arguments.no_save:
        stem = f"experts-{info['date']}-{info['gpu'].replace(' ', '_')}"
        document = {"machine": info, "copy": rates[0], "matmul": rates[1], "rows": [asdict(row) for row in rows]}
        (arguments.folder / f"{stem}.json").write_text(json.dumps(document, indent=1) + "\n")
        if find_spec("matplotlib"):
            plot(rows, rates, info["gpu"], arguments.folder / f"{stem}.png")


if __name__ == "__main__":
    main()
