"""Write the tables in docs/hardware.md: plans of `k26 plan` for common machines and published runs, and the known GPUs.

    python ci/hardware_table.py

The file is rewritten in place; a test compares it with what this program would write.
"""

from __future__ import annotations

from pathlib import Path

from published_runs import RUNS, Run

from k26_plugins.common.model.config import K26Config
from k26_plugins.operate.plan.advise import choose
from k26_plugins.operate.plan.fit import Fit, Load, fit
from k26_plugins.operate.plan.gpus import GIB, GPUS, MIB, SECONDARY
from k26_plugins.operate.plan.hardware import parse
from k26_plugins.operate.plan.hybrid import hybrid
from k26_plugins.operate.plan.weights import Layout

FILE = Path(__file__).parent.parent / "docs" / "hardware.md"
BEGIN, END = "<!-- made by ci/hardware_table.py: {} -->", "<!-- end -->"
MACHINES = (
    "8xH200",
    "8xB200",
    "8xB300",
    "4xB300",
    "4xGB300",
    "4xB200",
    "4xGB200",
    "8xMI300X",
    "8xMI355X",
    "8xH20",
    "8xRTXPRO6000",
    "16xH100",
    "8xH100",
    "4xH200",
    "4xH100",
    "8xA100",
    "8xL40S",
)


def table() -> str:
    """Return the table of machines in Markdown, with a line for each machine, for vLLM and 32,768 tokens."""
    config, load = K26Config(), Load(context=32768)
    lines = [
        "| machine | weights on a GPU | KV cache, bf16 | KV cache, fp8 | serves 32,768 tokens | hybrid: experts on GPUs |",
        "|---|---|---|---|---|---|",
    ]
    for machine in MACHINES:
        count, gpu = parse(machine)
        found = choose(config, gpu, count, load, "vllm")
        halved = choose(config, gpu, count, Load(context=32768, kv_dtype="fp8"), "vllm")
        layout = found.layout
        cut = f"yes, tensor parallel {layout.tp}" + (f", pipeline parallel {layout.pp}" if layout.pp > 1 else "")
        mixed = hybrid(config, choose(config, gpu, count, load, "ktransformers"), None)
        experts = "–" if layout.pp > 1 or mixed.gpu_missing else f"{mixed.gpu_experts} of {mixed.num_experts}"
        weights = sum(found.weights.values()) / GIB
        tokens = [f"{one.kv_tokens:,} tokens" if one.kv_tokens else "none" for one in (found, halved)]
        fits = cut if found.fits else "with fp8" if halved.fits else "**no**"
        name = f"{count} × {gpu.name}"
        lines.append(
            f"| {name} | {weights:.1f} of {gpu.memory / GIB:.1f} GiB | {tokens[0]} | {tokens[1]} | {fits} | {experts} |"
        )
    return "\n".join(lines)


def planned(run: Run) -> Fit:
    """Return the plan for a published run's machine and settings, with the vision tower cut as in that run."""
    layout = Layout(tp=run.tp, context_parallel=run.context_parallel, vision_whole=False)
    load = Load(kv_dtype=run.kv_dtype, memory_fraction=run.memory_fraction, sequences=run.sequences)
    return fit(K26Config(), parse(run.gpus)[1], layout, load)


def runs_table() -> str:
    """Return the table of published runs in Markdown, with the tokens that are planned for each."""
    lines = [
        "| machine | KV cache | memory | requests | decode-context parallel | published tokens | planned | error | source |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for run in RUNS:
        tokens = planned(run).kv_tokens
        source = f"[{run.source}]({run.link})" if run.link else run.source
        lines.append(
            f"| {run.gpus.replace('x', ' × ', 1)} | {run.kv_dtype} | {run.memory_fraction:.2f} | {run.sequences} | "
            f"{run.context_parallel} | {run.kv_tokens:,} | {tokens:,} | {tokens / run.kv_tokens - 1:+.1%} | {source} |"
        )
    return "\n".join(lines)


def gpus_table() -> str:
    """Return the table of the GPUs that `k26 plan` knows in Markdown, with the pages that publish their figures."""
    lines = ["| GPU | memory | from the | bandwidth | published at |", "|---|---|---|---|---|"]
    for gpu in GPUS:
        bandwidth = "–" if gpu.bandwidth is None else f"{gpu.bandwidth / 1e9:,.0f} GB/s"
        publisher = SECONDARY.get(gpu.link, "NVIDIA" if gpu.vendor == "nvidia" else "AMD")
        shown = f"{gpu.name} | {gpu.memory / MIB:,.0f} MiB | {gpu.source} | {bandwidth} | [{publisher}]({gpu.link})"
        lines.append(f"| {shown} |")
    return "\n".join(lines)


def written(text: str) -> str:
    """Return the text of the page with all tables replaced by new ones."""
    for name, made in (("machines", table()), ("runs", runs_table()), ("gpus", gpus_table())):
        begin = BEGIN.format(name)
        start = text.index(begin) + len(begin)
        text = f"{text[:start]}\n{made}\n{text[text.index(END, start) :]}"
    return text


if __name__ == "__main__":
    FILE.write_text(written(FILE.read_text(encoding="utf-8")), encoding="utf-8")
