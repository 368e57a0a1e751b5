"""Draw a plan's memory as bars of text, one for each pipeline stage, since all GPUs of a stage hold the same."""

from __future__ import annotations

from typing import Any

from k26_plugins.common.model.config import K26Config
from k26_plugins.operate.plan.fit import Fit, fit_stages
from k26_plugins.operate.plan.gpus import GIB
from k26_plugins.operate.plan.hybrid import Hybrid
from k26_plugins.operate.plan.weights import ROUTED

WIDTH = 60
MARKS = {"experts": "E", "other weights": "W", "activations and buffers": "a", "KV cache": "K", "free": "."}
LEGEND = ", ".join(f"{mark} {part}" for part, mark in MARKS.items())


def memory_by_gpu(config: K26Config, tightest: Fit, mixed: Hybrid | None) -> list[dict[str, Any]]:
    """Return, for each stage, its `gpus` (the first and the last number) and the `bytes` of each part of MARKS.

    The KV cache of every stage has as many tokens as fit in the tightest stage; that of a hybrid run has those of the
    load. mixed: how a hybrid run divides the experts, None for another plan.
    """
    found = []
    layout, load = tightest.layout, tightest.load
    tokens = tightest.kv_tokens if mixed is None else load.tokens
    for stage, held in enumerate(fit_stages(config, tightest.gpu, layout, load)):
        share = 1.0 if mixed is None else mixed.gpu_experts / mixed.num_experts
        experts = round(held.weights[ROUTED] * share)
        parts = {
            "experts": experts,
            "other weights": sum(held.weights.values()) - held.weights[ROUTED],
            "activations and buffers": held.activations + held.overhead,
            "KV cache": round(tokens * held.kv_per_token),
        }
        parts["free"] = held.gpu.memory - sum(parts.values())
        found.append({"gpus": [stage * layout.tp, (stage + 1) * layout.tp - 1], "bytes": parts})
    return found


def bars(config: K26Config, tightest: Fit, mixed: Hybrid | None) -> list[str]:
    """Return a line for each stage, then the legend.

    WIDTH characters are a GPU's whole memory; what does not fit is drawn behind the end of the bar.
    """
    memory = tightest.gpu.memory
    lines = []
    for stage in memory_by_gpu(config, tightest, mixed):
        first, last = stage["gpus"]
        bar, reached = "", 0
        for part, size in stage["bytes"].items():
            # Each part is drawn up to the rounded place where it ends, so that rounding errors do not add up.
            reached += size
            bar += MARKS[part] * (round(reached / memory * WIDTH) - len(bar))
        name = f"GPU {first}" if first == last else f"GPUs {first} to {last}"
        lines.append(f"    {name:<14}|{bar[:WIDTH]}|{bar[WIDTH:]} {memory / GIB:.1f} GiB")
    return [*lines, f"    {LEGEND}"]
