"""The way of cutting that leaves the most KV cache, and what would work where a machine does not."""

from __future__ import annotations

from dataclasses import replace

from k26_plugins.common.config import K26Config
from k26_plugins.operate.plan.fit import Fit, Load, fit
from k26_plugins.operate.plan.hardware import KNOWN, Gpu
from k26_plugins.operate.plan.hybrid import hybrid
from k26_plugins.operate.plan.weights import Layout, LayoutError, is_possible

WORTH_SERVING = 2048
"""Tokens of KV cache below which a smaller load is no advice."""


def layouts(config: K26Config, count: int, engine: str) -> list[Layout]:
    """Ways to cut over `count` GPUs: tensor parallel within a node of eight, pipeline stages between nodes."""
    found = []
    for tp in (1, 2, 4, 8):
        layout = Layout(tp=tp, pp=count // tp, absorbed_copy=engine != "vllm")
        if count % tp == 0 and is_possible(config, layout):
            found.append(layout)
    # Fewer stages first: a stage waits for the one before it.
    found.sort(key=lambda layout: layout.pp)
    return found if engine != "ktransformers" else found[:1]


def choose(config: K26Config, gpu: Gpu, count: int, load: Load, engine: str) -> Fit:
    """The first layout that fits, with the KV cache cut over ranks where the whole does not fit; else the nearest to it.

    Raises LayoutError where no layout is possible at all.
    """
    tried: list[Fit] = []
    for layout in layouts(config, count, engine):
        options = [layout]
        if engine == "vllm" and layout.pp == 1:
            options += [replace(layout, context_parallel=cut) for cut in (2, 4, 8) if layout.tp % cut == 0]
        for option in options:
            found = fit(config, gpu, option, load)
            if found.fits:
                return found
            tried.append(found)
    if not tried:
        raise LayoutError(f"{count} GPUs cannot share this model: use 1, 2, 4, 8, or a multiple of 8 for large ones.")
    # Where no layout leaves a KV cache the plainest says why.
    return max(tried, key=lambda item: item.kv_tokens)


def nearest(config: K26Config, gpu: Gpu, count: int, load: Load, engine: str, ram: int | None) -> list[str]:
    """What would work instead, the smallest change first."""
    advice = []
    now = choose(config, gpu, count, load, engine)
    if load.kv_dtype != "fp8" and choose(config, gpu, count, replace(load, kv_dtype="fp8"), engine).fits:
        advice.append("an fp8 KV cache: --kv-dtype fp8")
    if WORTH_SERVING <= now.kv_tokens < load.tokens:
        advice.append(f"a smaller load: {now.kv_tokens:,} tokens in all, such as --context {now.kv_tokens}")
    more = next((n for n in (8, 16, 24, 32) if n > count and choose(config, gpu, n, load, "vllm").fits), None)
    if more is not None:
        advice.append(f"more of the same: {more} × {gpu.name}")
    larger = [
        other
        for other in sorted(KNOWN.values(), key=lambda item: item.memory)
        if other.memory > gpu.memory and choose(config, other, count, load, "vllm").fits
    ]
    if larger:
        advice.append(f"larger ones: {count} × {larger[0].name}")
    if engine != "ktransformers":
        mixed = hybrid(config, choose(config, gpu, count, load, "ktransformers"), ram)
        if not mixed.gpu_missing and mixed.gpu_experts < mixed.num_experts:
            advice.append(f"KTransformers on these GPUs: {mixed.why} (--engine ktransformers)")
    return advice
