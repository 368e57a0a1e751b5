"""Predicted time of a token of one request in a hybrid run, with and without CUDA graphs. Nothing here is measured on a GPU.

    python kernels/bench/hybrid_token.py        the tables of docs/hybrid.md

A layer is what comes before the routing is known, then the CPU's experts beside the GPUs', then their sum. Bytes are the
planner's, read once at the memory's bandwidth, and a gap on the GPU follows each kernel. Without a graph a part takes at
least as long as the host needs to launch it, and the host waits for the routing; in a graph the stream calls the host twice.
"""

from __future__ import annotations

from dataclasses import dataclass

from k26_plugins.common.config import K26Config
from k26_plugins.operate.plan.advise import choose
from k26_plugins.operate.plan.fit import Fit, Load
from k26_plugins.operate.plan.gpus import GIB
from k26_plugins.operate.plan.hardware import parse
from k26_plugins.operate.plan.hybrid import Hybrid, expert_slot_bytes, hybrid

CONTEXT = 32768
# Measured: docs/cpu-experts.md, 80 to 99 % of what the machine reads.
NATIVE_SHARE = 0.85
# Assumed, as nothing below was measured on a GPU. Of the memory channels' peak:
READ_SHARE = 0.8
# Kernels of a layer: attention, norms and router; the GPUs' routed and shared experts; sums and what follows them.
BEFORE, BESIDE, AFTER = 12, 7, 3
# Seconds: to launch a kernel from Python, or in a graph; of a small copy; until the stream has called the host; until the
# host is awake after the stream; of a sum over GPUs, two in a layer.
LAUNCH, LAUNCH_IN_GRAPH, COPY, CALL, WAKE, SUM = 10e-6, 2e-6, 5e-6, 10e-6, 20e-6, 12e-6
COPIES = 4  # activations, ids and weights there, and the result back


@dataclass(frozen=True)
class Machine:
    name: str
    gpus: str
    channels: float
    """Bytes a second that the CPUs' memory has at most."""
    ram: int


MACHINES = (
    Machine("RTX 4090, two EPYC Milan", "1x4090", 2 * 8 * 3200e6 * 8, 1024 * 10**9),
    Machine("two RTX 4090, two EPYC Milan", "2x4090", 2 * 8 * 3200e6 * 8, 1024 * 10**9),
    Machine("four H100, two Xeon (Sapphire Rapids)", "4xH100", 2 * 8 * 4800e6 * 8, 1024 * 10**9),
    Machine("two GPUs of a GB200, its Grace", "2xGB200", 512e9, 480 * 10**9),
)


@dataclass(frozen=True)
class Token:
    """Seconds of a token; the parts are those of all layers, whatever runs beside them."""

    cpu: float
    gpu: float
    waits: float
    launches: float
    total: float


@dataclass(frozen=True)
class Prediction:
    machine: Machine
    fit: Fit
    plan: Hybrid
    cpu_bytes: float
    waiting: Token
    graph: Token


def predict(machine: Machine, config: K26Config) -> Prediction:
    text = config.text
    count, gpu = parse(machine.gpus)
    fit = choose(config, gpu, count, Load(context=CONTEXT), "ktransformers")
    plan = hybrid(config, fit, machine.ram)
    assert gpu.bandwidth is not None
    layers = text.num_hidden_layers - text.first_k_dense_replace
    on_gpu = plan.gpu_experts / plan.num_experts
    chosen = expert_slot_bytes(config) * text.num_experts_per_tok
    cpu_bytes = chosen * (1 - on_gpu)
    cpu = cpu_bytes / (machine.channels * READ_SHARE * NATIVE_SHARE) / layers
    beside = (chosen * on_gpu / fit.layout.tp + fit.weights["shared experts"]) / gpu.bandwidth / layers
    parts = ("attention", "dense feed-forward", "router", "norms")
    head = fit.weights["embedding and head"] / 2
    read = sum(fit.weights[part] for part in parts) + head + CONTEXT * fit.kv_per_token
    sums = 2 * SUM if fit.layout.tp > 1 else 0.0
    before = read / gpu.bandwidth / layers + sums

    def token(launch: float, waits: float) -> Token:
        def part(gpu: float, kernels: int) -> float:
            return max(gpu + kernels * LAUNCH_IN_GRAPH, kernels * launch)

        layer = part(before, BEFORE) + max(cpu, part(beside, BESIDE)) + part(0, AFTER) + waits
        times = (cpu, before + beside, waits, (BEFORE + BESIDE + AFTER) * launch, layer)
        return Token(*(time * layers for time in times))

    waiting = token(LAUNCH, COPIES * COPY + WAKE)
    graph = token(LAUNCH_IN_GRAPH, COPIES * COPY + 2 * CALL)
    return Prediction(machine, fit, plan, cpu_bytes, waiting, graph)


def table(config: K26Config) -> list[str]:
    """Rows of Markdown, milliseconds."""
    columns = ("machine", "experts on GPUs", "CPU reads", "CPU", "GPUs", "copies and waits", "launches")
    columns += ("a token", "copies and calls in a graph", "launches", "a token")
    lines = [_row(*columns), "|---" * len(columns) + "|"]
    for machine in MACHINES:
        found = predict(machine, config)
        if found.plan.gpu_missing:
            lacking = f"does not fit: lacks {found.plan.gpu_missing / GIB:.1f} GiB"
            lines.append(_row(machine.name, lacking, *("" for _ in columns[2:])))
            continue
        one, other = found.waiting, found.graph
        lines.append(
            _row(
                machine.name,
                f"{found.plan.gpu_experts} of {found.plan.num_experts}",
                f"{found.cpu_bytes / 1e9:.1f} GB",
                *(f"{time * 1e3:.1f}" for time in (one.cpu, one.gpu, one.waits, one.launches)),
                f"{one.total * 1e3:.0f}, {1 / one.total:.0f}/s",
                *(f"{time * 1e3:.1f}" for time in (other.waits, other.launches)),
                f"{other.total * 1e3:.0f}, {1 / other.total:.0f}/s",
            )
        )
    return lines


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print("\n".join(table(K26Config())))
