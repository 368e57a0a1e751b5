"""Predict the time of a token in a hybrid run of one request, with and without CUDA graphs.

Nothing here is measured on a GPU.

    python kernels/bench/hybrid_token.py        the tables of docs/hybrid.md

The cost model is the planner's (`k26_plugins/operate/plan/hybrid_speed.py`). It takes the CPU's experts to be as fast
as the memory channels allow, and adds a gap on the GPU after each kernel. Without a graph, a part takes at least as
long as the host needs to launch its kernels, and the host waits for the routing. In a graph, the stream calls the host
twice.
"""

from __future__ import annotations

from dataclasses import dataclass

from k26_plugins.common.model.config import K26Config
from k26_plugins.operate.plan.advise import choose
from k26_plugins.operate.plan.fit import Fit, Load
from k26_plugins.operate.plan.gpus import GIB
from k26_plugins.operate.plan.hardware import parse
from k26_plugins.operate.plan.hybrid import Hybrid, expert_slot_bytes, hybrid
from k26_plugins.operate.plan.hybrid_speed import Rates, Step, decode_step

CONTEXT = 32768
# The share of the memory channels' peak bandwidth that is assumed to be reached.
READ_SHARE = 0.8


@dataclass(frozen=True)
class Machine:
    """A machine for which the time of a token is predicted."""

    name: str
    gpus: str
    """The GPUs as `k26 plan --gpus` takes them."""
    channels: float
    """Peak bandwidth of the CPUs' memory, bytes a second."""
    ram: int
    """Bytes of system memory."""


MACHINES = (
    Machine("RTX 4090, two EPYC Milan", "1x4090", 2 * 8 * 3200e6 * 8, 1024 * 10**9),
    Machine("two RTX 4090, two EPYC Milan", "2x4090", 2 * 8 * 3200e6 * 8, 1024 * 10**9),
    Machine("four H100, two Xeon (Sapphire Rapids)", "4xH100", 2 * 8 * 4800e6 * 8, 1024 * 10**9),
    Machine("two GPUs of a GB200, its Grace", "2xGB200", 512e9, 480 * 10**9),
)


@dataclass(frozen=True)
class Prediction:
    """The plan for a machine, and the predicted times of a token."""

    machine: Machine
    fit: Fit
    plan: Hybrid
    cpu_bytes: float
    """Bytes of experts that the CPU reads for a token, in all layers together."""
    waiting: Step
    """The step without CUDA graphs, in which the host waits for the routing."""
    graph: Step
    """The step in a CUDA graph."""


def predict(machine: Machine, config: K26Config) -> Prediction:
    """Return the plan and the times of a token for a context of CONTEXT tokens."""
    count, gpu = parse(machine.gpus)
    fit = choose(config, gpu, count, Load(context=CONTEXT), "ktransformers")
    plan = hybrid(config, fit, machine.ram)
    rates = Rates.of_bandwidth(config, machine.channels * READ_SHARE)
    cpu_bytes = expert_slot_bytes(config) * config.text.num_experts_per_tok * (1 - plan.gpu_experts / plan.num_experts)
    waiting, graph = (
        decode_step(config, fit, plan, rates, sequences=1, context=CONTEXT, in_graph=in_graph)
        for in_graph in (False, True)
    )
    return Prediction(machine, fit, plan, cpu_bytes, waiting, graph)


def table(config: K26Config) -> list[str]:
    """Return the lines of a table in Markdown, with times in milliseconds."""
    columns: tuple[str, ...] = (
        "machine",
        "experts on GPUs",
        "CPU reads",
        "CPU",
        "GPUs",
        "copies and waits",
        "launches",
    )
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
