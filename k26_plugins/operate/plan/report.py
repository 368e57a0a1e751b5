"""Make a plan for an engine on a machine, and show it as text or JSON."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from k26_plugins.common.model.config import K26Config
from k26_plugins.operate.machine import Machine
from k26_plugins.operate.plan.advise import Advice, choose, nearest
from k26_plugins.operate.plan.command import (
    HEAD,
    ktransformers_command,
    of_each_node,
    sglang_command,
    shown,
    vllm_command,
    with_ray,
)
from k26_plugins.operate.plan.draw import bars, memory_by_gpu
from k26_plugins.operate.plan.fit import OVERHEAD_SOURCE, Fit, Load
from k26_plugins.operate.plan.gpus import GIB
from k26_plugins.operate.plan.hybrid import Hybrid, cpu_bound, hybrid
from k26_plugins.operate.plan.hybrid_speed import Rates, Speed, fastest, threads_of
from k26_plugins.operate.plan.speed import decode_bound
from k26_plugins.operate.plan.tuned import experts_line
from k26_plugins.operate.plan.weights import PARTS

OVERHEAD_ROW = "graphs, buffers, context"


@dataclass(slots=True)
class Plan:
    """The plan of one engine on one machine: whether it fits, and the commands or advice."""

    engine: str
    machine: Machine
    fit: Fit
    """The tightest pipeline stage."""
    hybrid: Hybrid | None
    """How the experts are divided; None for another plan than KTransformers'."""
    commands: list[list[str]]
    """The command of each machine, by the machine's rank; empty if the plan does not fit."""
    ray: list[list[str]]
    """The commands for a Ray cluster, as `with_ray` returns them; empty if there is only one machine."""
    bounds: dict[str, float]
    """Upper bounds on tokens per second, by what sets the bound."""
    config: K26Config
    advice: list[Advice] = field(default_factory=list)
    """What would work instead; empty if the plan fits."""
    speed: Speed | None = None
    """The predicted speed of a hybrid run whose machine was measured."""

    @property
    def fits(self) -> bool:
        """Whether the machine holds the model and the load."""
        return self.hybrid.fits if self.hybrid is not None else self.fit.fits

    @property
    def used(self) -> int:
        """Number of GPUs that the commands run on."""
        return self.fit.layout.tp * self.fit.layout.pp

    @property
    def why(self) -> str:
        """One sentence that says why the plan fits, or why it does not."""
        return self.hybrid.why if self.hybrid is not None else self.fit.why


def make_plan(
    config: K26Config, engine: str, machine: Machine, load: Load, checkpoint: str, rates: Rates | None = None
) -> Plan:
    """Return the plan of one engine on one machine.

    checkpoint: a folder or a name on the hub, for the commands. rates: the machine's measured rates, with which the
    speed of a hybrid run is predicted and its chunk size chosen. Raises LayoutError if the model cannot be cut over so
    many GPUs.
    """
    chosen = choose(config, machine.gpu, machine.count, load, engine)
    mixed = hybrid(config, chosen, machine.ram) if engine == "ktransformers" else None
    speed = None
    if rates is not None:
        best = fastest(config, chosen, machine.ram, rates)
        if best is not None:
            chosen, mixed, speed = best
    plan = Plan(engine, machine, chosen, mixed, [], [], {}, config, speed=speed)
    if not plan.fits:
        plan.advice = nearest(config, machine.gpu, machine.count, load, engine, machine.ram, machine.request)
        return plan
    if mixed is not None:
        command = ktransformers_command(
            checkpoint, chosen, mixed, threads_of(machine.cores, chosen.layout.tp), machine.sockets
        )
    else:
        command = (vllm_command if engine == "vllm" else sglang_command)(checkpoint, chosen)
    nodes = chosen.layout.nodes
    plan.commands = of_each_node(engine, command, nodes)
    plan.ray = with_ray(engine, command, nodes) if nodes > 1 else []
    share = 1.0 if mixed is None else mixed.gpu_experts / mixed.num_experts
    for sequences in dict.fromkeys((1, load.concurrency)):
        bound = decode_bound(config, chosen, sequences, load.context, gpu_experts=share)
        if bound is not None:
            plan.bounds[f"GPU memory, {sequences} at once"] = bound
    if mixed is not None and machine.ram_bandwidth is not None:
        plan.bounds["system memory, 1 at once"] = cpu_bound(config, mixed, machine.ram_bandwidth)
    return plan


def rows(plan: Plan) -> list[tuple[str, int]]:
    """Return the name and the bytes of each part that one GPU holds."""
    fit = plan.fit
    weights = [(part, size) for part, size in fit.weights.items() if size]
    if plan.hybrid is not None:
        share = plan.hybrid.gpu_experts / plan.hybrid.num_experts
        weights = [(part, round(size * share) if part == PARTS[0] else size) for part, size in weights]
        kv = round(fit.load.tokens * fit.kv_per_token)
    else:
        kv = max(fit.kv_bytes, 0)
    return [*weights, ("activations", fit.activations), (OVERHEAD_ROW, fit.overhead), ("KV cache", kv)]


def as_text(plan: Plan) -> str:
    """Return the plan as lines for a terminal."""
    fit, layout = plan.fit, plan.fit.layout
    cut = f"tensor parallel {layout.tp}"
    cut += f", pipeline parallel {layout.pp}" if layout.pp > 1 else ""
    cut += f", KV cache over {layout.context_parallel} ranks" if layout.context_parallel > 1 else ""
    lines = [
        f"{'fits' if plan.fits else 'does NOT fit'}: {_machines(plan)}, {plan.engine}, {cut}",
        f"  {plan.why}",
        "",
        f"  on each GPU of {fit.gpu.memory / GIB:.1f} GiB (the fullest stage):",
    ]
    notes = {OVERHEAD_ROW: f"  ({OVERHEAD_SOURCE})"}
    lines += [f"    {name:<26}{size / GIB:8.2f} GiB{notes.get(name, '')}" for name, size in rows(plan)]
    lines += bars(plan.config, fit, plan.hybrid)
    if plan.hybrid is None and fit.kv_tokens:
        lines.append(f"  KV cache: {fit.kv_tokens:,} tokens of {fit.kv_per_token:,.0f} bytes on each GPU")
        lines.append(
            f"  largest context {fit.largest_context:,}; largest concurrency of the load {fit.largest_concurrency}"
        )
    for what, bound in plan.bounds.items():
        lines.append(f"  decoding at most {bound:,.0f} tokens/s ({what}; a bound from bandwidths, not a measurement)")
    if plan.speed is not None:
        lines += _predicted(plan.speed)
    if plan.hybrid is None:
        lines.append(f"  {experts_line(plan.engine, plan.config.text, fit)}")
    lines += _commands(plan)
    if plan.advice:
        lines += [
            "",
            "  what works:",
            *(f"    - {line.text}: k26 plan {shlex.join(line.options)}" for line in plan.advice),
        ]
    return "\n".join(lines)


def _predicted(speed: Speed) -> list[str]:
    prompt, answer = speed.prompt_tokens, speed.answer_tokens
    return [
        f"  predicted for one request of {prompt + answer:,} tokens, {answer:,} of them its answer, from what was measured",
        "  here and what docs/hybrid.md assumes of a GPU, on which nobody measured it:",
        f"    prompt {prompt / speed.prompt_seconds:,.0f} tokens/s in chunks of {speed.chunk:,}: "
        f"{speed.prompt_seconds:,.1f} s to the first token",
        f"    answer {1 / speed.waiting.total:,.1f} tokens/s, with CUDA graphs {1 / speed.graph.total:,.1f}",
    ]


def _machines(plan: Plan) -> str:
    count, used, nodes = plan.machine.count, plan.used, plan.fit.layout.nodes
    gpus = f"{count} × {plan.machine.gpu.name}"
    if used < count:
        gpus += f", of which {used} are used"
    return gpus if nodes == 1 else f"{gpus} in {nodes} machines of {count // nodes}"


def _commands(plan: Plan) -> list[str]:
    if len(plan.commands) == 1:
        lines = ["", shown(plan.commands[0])]
        if plan.hybrid is not None and not Path(plan.commands[0][4]).is_dir():
            lines.append("  (KTransformers reads a downloaded folder: give it with --checkpoint)")
        return lines
    lines = []
    if plan.commands:
        lines += ["", f"  on each machine, with {HEAD} the first one's address, which all others reach:"]
    for rank, command in enumerate(plan.commands):
        lines += ["", f"  machine {rank}:", shown(command)]
    if plan.ray:
        first, served, other = plan.ray
        lines += ["", "  or over a Ray cluster, on the first machine:", shown(first), "  on each other machine:"]
        lines += [shown(other), "  then on the first:", shown(served)]
    return lines


def as_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as a mapping that can be written as JSON; sizes are in bytes."""
    fit = plan.fit
    return {
        "fits": plan.fits,
        "why": plan.why,
        "engine": plan.engine,
        "gpus": plan.machine.count,
        "gpu": plan.machine.gpu.name,
        "tensor_parallel": fit.layout.tp,
        "pipeline_parallel": fit.layout.pp,
        "context_parallel": fit.layout.context_parallel,
        "bytes_per_gpu": dict(rows(plan)),
        "memory_by_gpu": memory_by_gpu(plan.config, fit, plan.hybrid),
        "overhead_source": OVERHEAD_SOURCE,
        "kv_tokens": fit.kv_tokens if plan.hybrid is None else fit.load.tokens,
        "largest_context": fit.largest_context,
        "largest_concurrency": fit.largest_concurrency,
        "gpu_experts": None if plan.hybrid is None else plan.hybrid.gpu_experts,
        "ram_needed": None if plan.hybrid is None else plan.hybrid.ram_needed,
        "bounds_tokens_per_second": plan.bounds,
        "predicted": None if plan.speed is None else asdict(plan.speed),
        "nodes": fit.layout.nodes,
        "gpus_used": plan.used,
        "gpu_memory_source": plan.machine.gpu.source,
        "gpu_link": plan.machine.gpu.link,
        "command": plan.commands[0] if len(plan.commands) == 1 else None,
        "commands": plan.commands,
        "ray_commands": plan.ray,
        "advice": [{"text": item.text, "options": list(item.options)} for item in plan.advice],
    }
