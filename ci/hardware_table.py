"""Write the table in docs/hardware.md: what `k26 plan` says of common machines.

    python ci/hardware_table.py

Without an argument the file is rewritten; a test holds it to what this prints.
"""

from __future__ import annotations

from pathlib import Path

from k26_plugins.common.config import K26Config
from k26_plugins.operate.plan.advise import choose
from k26_plugins.operate.plan.fit import Load
from k26_plugins.operate.plan.hardware import GIB, parse
from k26_plugins.operate.plan.hybrid import hybrid

FILE = Path(__file__).parent.parent / "docs" / "hardware.md"
BEGIN, END = "<!-- made by ci/hardware_table.py -->", "<!-- end -->"
MACHINES = (
    "8xH200",
    "8xB200",
    "8xB300",
    "4xB300",
    "4xB200",
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
    """Markdown, a line a machine, for vLLM and 32,768 tokens."""
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


def written(text: str) -> str:
    """The page with the table in its place."""
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    return f"{text[:start]}\n{table()}\n{text[end:]}"


if __name__ == "__main__":
    FILE.write_text(written(FILE.read_text(encoding="utf-8")), encoding="utf-8")
