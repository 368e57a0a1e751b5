"""Finds the fastest tiles for this GPU and prints them, by target and shape.

    cd kernels && python -m bench.tune                 the whole layer, its part under TP8 and under EP8
    cd kernels && python -m bench.tune --layers tp8

For every size of a block of tokens a batch is timed that calls for it, first with each tile for w13, then for w2. A tile
that does not compile or does not fit is passed over.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, replace

import torch
import triton
from bench.experts import seconds_of
from bench.peers import Weights
from bench.routing import LAYERS, TOP_K, Layer, choose, expert_map
from k26_kernels import KernelExperts
from k26_kernels.config import SINGLE, Regime, Tile, regimes
from k26_kernels.experts import Launcher, make_plan
from k26_kernels.layout import FRAGMENTS
from k26_kernels.target import Target

# Tokens of the batch for each block, such as call for it with 8 of 384 experts.
TOKENS = {SINGLE: 1, "16": 64, "32": 512, "64": 2048, "128": 8192}
STAGES = (2, 3, 4, 5, 6)


def candidates(target: Target) -> Iterator[Tile]:
    """Tiles that the layout allows."""
    stages = (1, 2) if target.amd else STAGES
    step = FRAGMENTS[target.fragment].step
    steps = (128,) if target.amd else [k for k in (64, 128, 256) if k % step == 0]
    for rows, block_k, warps, ahead in itertools.product((64, 128), steps, (4, 8), stages):
        yield Tile(rows, block_k, warps, ahead)


def time_of(experts: KernelExperts, layer: Layer, regime: Regime, tokens: int) -> float:
    """Seconds of a batch with these tiles; infinite where they do not run."""
    device = experts.w13_packed.device
    local = expert_map(layer)
    local = None if local is None else local.to(device)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, layer.shape.hidden_size, generator=generator).to(device, torch.bfloat16)
    plan = replace(make_plan(experts.device, layer.shape, tokens, TOP_K, 384), regime=regime)
    workspace = torch.empty(plan.bytes, dtype=torch.uint8, device=device)
    weights = torch.rand(tokens, TOP_K, generator=generator).to(device)
    out = torch.empty_like(x)
    launchers = [
        Launcher(experts, plan, workspace, choose("uniform", tokens, seed).to(device), weights, local)
        for seed in range(max(1, 8 // tokens))
    ]
    try:
        return seconds_of(lambda: [launcher.run(x, out) for launcher in launchers], 3)
    except (triton.TritonError, RuntimeError):
        return float("inf")


def tune(experts: KernelExperts, layer: Layer) -> dict[str, Regime]:
    """The best regime for each block of tokens, starting from the present ones."""
    best: dict[str, Regime] = {}
    for name, present in regimes(experts.device, layer.shape).items():
        regime = present
        for product in ("w13", "w2"):
            inputs = layer.shape.hidden_size if product == "w13" else layer.shape.intermediate_size
            tiles = [tile for tile in candidates(experts.device.target) if inputs % tile.block_k == 0]
            trials = [replace(regime, **{product: tile}) for tile in (getattr(regime, product), *tiles)]
            regime = min(trials, key=lambda trial: time_of(experts, layer, trial, TOKENS[name]))
        best[name] = regime
        print(layer.name, name, regime, flush=True)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default=",".join(LAYERS), help="of whole, tp8, ep8")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench.tune needs the GPU that it tunes for, and finds none.")
    device = torch.device("cuda")
    document: dict[str, dict[str, object]] = {}
    for name in arguments.layers.split(","):
        layer = LAYERS[name]
        weights = Weights.random(
            layer.shape.num_experts, layer.shape.hidden_size, layer.shape.intermediate_size, device
        )
        experts = KernelExperts.from_checkpoint(
            weights.w13_packed, weights.w13_scale, weights.w2_packed, weights.w2_scale
        )
        found = {regime: asdict(tiles) for regime, tiles in tune(experts, layer).items()}
        document.setdefault(experts.device.target.name, {})[layer.shape.key] = found
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
