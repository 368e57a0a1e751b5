"""Find the fastest tiles (kernel configs) for this GPU and a rank's part of a layer.

There is a config for every size of a block of tokens. For each size, a batch that calls for it is timed with every
candidate for the GEMM w13, and then for w2. A tile that does not compile or does not fit is skipped.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import triton
from k26_kernels import KernelExperts
from k26_kernels.config import SINGLE, SINGLE_TOKENS, GemmConfig, KernelConfig, kernel_configs
from k26_kernels.experts import Launcher, plan_of
from k26_kernels.layout import FRAGMENTS
from k26_kernels.target import Target

from k26_plugins.operate.tune.clock import Clock
from k26_plugins.operate.tune.routing import Layer

# Tokens of the batch that is timed for each block size. With 8 of 384 experts, a batch of so many tokens calls for that
# size.
TOKENS = {SINGLE: 1, "16": 64, "32": 512, "64": 2048, "128": 8192}
STAGES = (2, 3, 4, 5, 6)


def candidates(target: Target, present: GemmConfig) -> list[GemmConfig]:
    """Return the configs of a GEMM that the layout allows, with those that differ least from the present one first."""
    stages = (1, 2) if target.amd else STAGES
    step = FRAGMENTS[target.fragment].step
    steps = (128,) if target.amd else [k for k in (64, 128, 256) if k % step == 0]
    found = [GemmConfig(*sizes) for sizes in itertools.product((64, 128), steps, (4, 8), stages)]

    def distance(tile: GemmConfig) -> int:
        others = (
            (tile.BLOCK_SIZE_N, tile.BLOCK_SIZE_K, tile.num_warps),
            (present.BLOCK_SIZE_N, present.BLOCK_SIZE_K, present.num_warps),
        )
        return 8 * sum(a != b for a, b in zip(*others, strict=True)) + abs(tile.num_stages - present.num_stages)

    return sorted(found, key=distance)


def time_of(experts: KernelExperts, layer: Layer, config: KernelConfig, tokens: int, clock: Clock) -> float:
    """Return the seconds of the layer's batches of `tokens` tokens with these tiles; infinity if they do not run."""
    device = experts.w13_packed.device
    local = layer.expert_map(device)
    sizes = tokens, layer.top_k, layer.global_experts
    plan = plan_of(experts.device, experts.shape, config, tokens > SINGLE_TOKENS, *sizes)
    workspace = torch.empty(plan.bytes, dtype=torch.uint8, device=device)
    data = layer.batches("uniform", tokens, device)
    out = torch.empty_like(data[0].hidden_states)
    launchers = [
        (Launcher(experts, plan, workspace, batch.topk_ids, batch.topk_weights, local), batch.hidden_states)
        for batch in data
    ]

    def run() -> None:
        for launcher, x in launchers:
            launcher.run(x, out)

    try:
        return clock(run, False)
    except (triton.TritonError, RuntimeError):
        return float("inf")


def searches(experts: KernelExperts, layer: Layer) -> Iterator[tuple[str, str, list[GemmConfig]]]:
    """Yield each search: the name of a kernel config, one of its GEMMs, and the candidates beside the present tile."""
    for name, present in kernel_configs(experts.device, experts.shape).items():
        for gemm, in_features in (("w13", layer.hidden_size), ("w2", layer.intermediate_size)):
            tile = getattr(present, gemm)
            others = candidates(experts.device.target, tile)
            yield name, gemm, [one for one in others if in_features % one.BLOCK_SIZE_K == 0 and one != tile]


def fastest_tiles(
    experts: KernelExperts, layer: Layer, clock: Clock, seconds: float, on_search: Callable[[str], object]
) -> dict[str, KernelConfig]:
    """Return the best config for each block size, starting from the present ones.

    seconds: for all searches together. Each search gets a share of the time that is left, and candidates that it does
    not reach in that time are not tried. on_search: called after each search with its name.
    """
    best = dict(kernel_configs(experts.device, experts.shape))
    todo = list(searches(experts, layer))
    end = time.monotonic() + seconds
    for index, (name, gemm, tiles) in enumerate(todo):
        until = time.monotonic() + (end - time.monotonic()) / (len(todo) - index)
        fastest = time_of(experts, layer, best[name], TOKENS[name], clock)
        for tile in tiles:
            if time.monotonic() > until:
                break
            trial = replace(best[name], w13=tile) if gemm == "w13" else replace(best[name], w2=tile)
            taken = time_of(experts, layer, trial, TOKENS[name], clock)
            if taken < fastest:
                fastest, best[name] = taken, trial
        on_search(f"{name} {gemm}")
    return best
