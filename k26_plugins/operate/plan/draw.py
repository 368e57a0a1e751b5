"""A plan's memory as bars of text, one for the GPUs of each pipeline stage: they hold the same."""

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
    """For each stage its `gpus` (first and last) and `bytes` by part. The tightest stage says how long the KV cache is."""
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
    """A line for each stage, `WIDTH` characters for all of a GPU's memory, and the legend; more where it does not fit."""
    memory = tightest.gpu.memory
    lines = []
    for stage in memory_by_gpu(config, tightest, mixed):
        first, last = stage["gpus"]
        bar, reached = "", 0
        for part, size in stage["bytes"].items():
            # A part is drawn to where it ends, so that rounding adds up to the whole.
            reached += size
            bar += MARKS[part] * (round(reached / memory * WIDTH) - len(bar))
        name = f"GPU {first}" if first == last else f"GPUs {first} to {last}"
        lines.append(f"    {name:<14}|{bar[:WIDTH]}|{bar[WIDTH:]} {memory / GIB:.1f} GiB")
    return [*lines, f"    {LEGEND}"]
