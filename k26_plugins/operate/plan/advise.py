"""Choose the parallel layout of a model over a machine's GPUs, and advise what would work if none fits."""

from __future__ import annotations

from dataclasses import dataclass, replace

from k26_plugins.common.model.config import K26Config
from k26_plugins.operate.plan.fit import IMAGE_TOKENS, Fit, Load, fit
from k26_plugins.operate.plan.gpus import KNOWN, Gpu
from k26_plugins.operate.plan.hybrid import Hybrid, hybrid
from k26_plugins.operate.plan.weights import GPUS_IN_A_NODE, Layout, LayoutError, is_possible, node_of

WORTH_SERVING = 2048
"""Tokens of the shortest request that is still advised; a server of shorter requests is of no use."""
COUNTS = (1, 2, 4, 8, 16, 24, 32)
"""Numbers of GPUs that are tried for advice."""


@dataclass(frozen=True, slots=True)
class Advice:
    """A deployment that fits, with the options of `k26 plan` that show it."""

    text: str
    options: tuple[str, ...]


def layouts(config: K26Config, count: int, engine: str) -> list[Layout]:
    """Return the possible layouts over `count` GPUs: tensor parallel within a machine, pipeline stages for the rest.

    The layouts with the fewest pipeline stages come first. KTransformers has no pipeline stages: its only layout is the
    largest tensor parallelism that is possible within one machine, which may leave GPUs idle.
    """
    found = []
    node = node_of(count)
    for tp in (1, 2, 4, 8):
        layout = Layout(tp=tp, pp=count // tp, nodes=count // node, absorbed_copy=engine != "vllm")
        if engine == "ktransformers":
            layout = replace(layout, pp=1, nodes=1)
            possible = tp <= min(count, GPUS_IN_A_NODE)
        else:
            possible = node % tp == 0
        if possible and is_possible(config, layout):
            found.append(layout)
    # Layouts with fewer stages come first, because each stage waits for the stage before it.
    found.sort(key=lambda layout: (layout.pp, -layout.tp))
    return found if engine != "ktransformers" else found[:1]


def options_of(config: K26Config, count: int, engine: str) -> list[Layout]:
    """Return `layouts`, each followed by the same layout with decode-context parallelism, if the engine supports it.

    Decode-context parallelism, which only vLLM's layouts without pipeline stages get, splits the KV cache of each
    request over 2, 4 or 8 ranks.
    """
    found = []
    for layout in layouts(config, count, engine):
        found.append(layout)
        if engine == "vllm" and layout.pp == 1:
            found += [replace(layout, context_parallel=cut) for cut in (2, 4, 8) if layout.tp % cut == 0]
    return found


def choose(config: K26Config, gpu: Gpu, count: int, load: Load, engine: str) -> Fit:
    """Return the fit of the first layout that holds the load; if none does, that of the layout with the most KV cache.

    Raises LayoutError if no layout is possible at all.
    """
    tried: list[Fit] = []
    for layout in options_of(config, count, engine):
        found = fit(config, gpu, layout, load)
        if found.fits:
            return found
        tried.append(found)
    if not tried:
        raise LayoutError(f"{count} GPUs cannot share this model: it has {config.text.num_hidden_layers} layers.")
    # If no layout leaves a KV cache, `max` returns the first and simplest one, whose reason is the easiest to
    # understand.
    return max(tried, key=lambda item: item.kv_tokens)


def nearest(
    config: K26Config, gpu: Gpu, count: int, load: Load, engine: str, ram: int | None, request: str
) -> list[Advice]:
    """Return what would work instead of a plan that does not fit, the smallest change first. Each entry fits.

    ram: bytes of system memory, for a hybrid run; None if unknown. request: the GPUs as the user gave them.
    """
    here = ("--gpus", request, *_load_options(load))
    if engine == "ktransformers":
        return _nearest_hybrid(config, gpu, count, load, ram, request)
    advice = []
    now = choose(config, gpu, count, load, engine)
    fp8 = replace(load, kv_dtype="fp8")
    if load.kv_dtype != "fp8" and choose(config, gpu, count, fp8, engine).fits:
        advice.append(Advice("an fp8 KV cache", (*here, "--kv-dtype", "fp8")))
    context = min(now.kv_tokens // load.concurrency, now.max_position) - load.images * IMAGE_TOKENS
    smaller = replace(load, context=max(context, 1))
    if context >= WORTH_SERVING and choose(config, gpu, count, smaller, engine).fits:
        advice.append(Advice("shorter requests", ("--gpus", request, *_load_options(smaller))))
    fewest = _fewest(config, load, engine)
    if fewest is not None:
        number, other = fewest
        advice.append(
            Advice("the fewest GPUs that hold it", ("--gpus", f"{number}x{other.name}", *_load_options(load)))
        )
    more = next((n for n in COUNTS if n > count and _fits(config, gpu, n, load, engine)), None)
    if more is not None:
        kind = request.split("x", 1)[-1] if request[:1].isdigit() else request
        advice.append(Advice("more of the same", ("--gpus", f"{more}x{kind}", *_load_options(load))))
    mixed = hybrid(config, choose(config, gpu, count, load, "ktransformers"), ram)
    if not mixed.gpu_missing and mixed.gpu_experts < mixed.num_experts:
        advice.append(_hybrid_advice(mixed, here))
    return advice


def _nearest_hybrid(config: K26Config, gpu: Gpu, count: int, load: Load, ram: int | None, request: str) -> list[Advice]:
    found = choose(config, gpu, count, load, "ktransformers")
    mixed = hybrid(config, found, ram)
    if not mixed.gpu_missing:
        return [_hybrid_advice(mixed, ("--gpus", request, *_load_options(load)))]
    shorter = load
    while mixed.gpu_missing and shorter.context > WORTH_SERVING:
        shorter = replace(shorter, context=shorter.context // 2)
        mixed = hybrid(config, choose(config, gpu, count, shorter, "ktransformers"), ram)
    if mixed.gpu_missing:
        return []
    return [_hybrid_advice(mixed, ("--gpus", request, *_load_options(shorter)), "shorter requests, and ")]


def _hybrid_advice(mixed: Hybrid, here: tuple[str, ...], before: str = "") -> Advice:
    gigabytes = -(-max(mixed.ram_needed, mixed.ram or 0) // 10**9)
    text = (
        f"{before}KTransformers on these GPUs, {mixed.gpu_experts} of {mixed.num_experts} experts of each layer on them"
    )
    return Advice(
        f"{text} and {mixed.ram_needed / 1e9:.0f} GB of system memory",
        (*here, "--engine", "ktransformers", "--ram", str(gigabytes)),
    )


def _fewest(config: K26Config, load: Load, engine: str) -> tuple[int, Gpu] | None:
    """Return the smallest number of equal known GPUs that holds the load, and the kind of GPU; None if 8 are too few.

    If several kinds of GPU hold the load with that number, the kind with the least memory is returned.
    """
    for count in COUNTS[:4]:
        for gpu in sorted(KNOWN.values(), key=lambda item: item.memory):
            if _fits(config, gpu, count, load, engine):
                return count, gpu
    return None


def _fits(config: K26Config, gpu: Gpu, count: int, load: Load, engine: str) -> bool:
    return choose(config, gpu, count, load, engine).fits


def _load_options(load: Load) -> tuple[str, ...]:
    """Return the options of `k26 plan` for the values of the load that differ from the defaults."""
    usual, options = Load(), []
    for name, option in (
        ("context", "--context"),
        ("concurrency", "--concurrency"),
        ("images", "--images"),
        ("kv_dtype", "--kv-dtype"),
        ("memory_fraction", "--gpu-memory-utilization"),
    ):
        if getattr(load, name) != getattr(usual, name):
            options += [option, str(getattr(load, name))]
    return tuple(options)
