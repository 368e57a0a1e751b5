"""Predict the times of the fused experts on an H200, from the compiled code and the bytes. Nothing here is measured.

    cd kernels && python -m bench.cost_model            a table
    cd kernels && python -m bench.cost_model --save     and bench/results/predicted-H200.json

A GEMM has four floors: its bytes at the copy bandwidth; its matrix instructions at the matmul rate, including the empty
columns of a block; its instructions at one for each cycle and scheduler; and the tiles of the program that has the most
of them, if its warps issue an instruction every other cycle at best, which is assumed. The predicted time is the
largest of the four, summed over the GEMMs, plus the traffic of the sums and a fixed cost for each launch, which is
lower for a launch that begins while the one before it ends. The model leaves out what the floors cost each other by
overlapping badly, so a measured time will be longer.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import triton
from bench.compiled import Facts, compile_variant, gemm_variant
from bench.layers import GLOBAL_EXPERTS, LAYERS, TOKENS, TOP_K
from k26_kernels.align import PAIRS_AT_ONCE
from k26_kernels.config import SINGLE, GemmConfig, Shape
from k26_kernels.experts import TOKENS_AT_ONCE, Plan, make_plan
from k26_kernels.target import TARGETS, Device

from k26_plugins.operate.tune.routing import Layer


@dataclass(frozen=True)
class Machine:
    """A GPU and its rates, in units a second; launches are in seconds.

    Bandwidth and matmul rate of H200 were measured on one before this package had kernels.
    """

    device: Device
    bandwidth: float
    matmul: float
    clock: float
    launch: float
    dependent_launch: float
    """Seconds of a launch that begins while the one before it ends; `launch` is for one that does not."""
    cycles: float
    """Number of cycles between two instructions of a warp."""

    @property
    def instructions(self) -> float:
        """Warp instructions a second: an SM has four schedulers."""
        return 4 * self.device.num_sms * self.clock


# Assumed are 1.7 GHz for a busy H200, 2 µs for a launch inside a CUDA graph, 1 µs for one that begins while another
# ends, and that a warp waits in half of its cycles.
H200 = Machine(Device(TARGETS["sm_90"], "NVIDIA H200", 132), 4.3e12, 790e12, 1.7e9, 2e-6, 1e-6, 2.0)


def shape_of(layer: Layer) -> Shape:
    """Return a layer's sizes as the kernels take them."""
    return Shape(layer.hidden_size, layer.intermediate_size, layer.num_experts)


class Compiled:
    """The facts of the GEMMs, each of which is compiled when it is first asked for."""

    def __init__(self) -> None:
        self.facts: dict[tuple[object, ...], Facts] = {}

    def of(self, layer: Layer, plan: Plan, gated: bool) -> Facts:
        """Return the facts of a plan's w13 GEMM (gated) or w2 GEMM."""
        split_k = plan.split_w13 if gated else plan.split_w2
        name = SINGLE if not plan.sorted else str(plan.config.BLOCK_SIZE_M)
        key = (layer.name, name, gated, split_k > 1)
        if key not in self.facts:
            gemm_config = plan.config.w13 if gated else plan.config.w2
            target = H200.device.target
            variant = gemm_variant(target, shape_of(layer), name, plan.config, gemm_config, gated, split_k)
            self.facts[key] = compile_variant(variant)
        return self.facts[key]


def gemm_seconds(
    machine: Machine,
    facts: Facts,
    gemm_config: GemmConfig,
    out_features: int,
    in_features: int,
    blocks: int,
    touched: int,
    block: int,
    split_k: int,
    extra: int,
) -> dict[str, float]:
    """Return the four floors of one GEMM in seconds, by name.

    blocks: number of blocks of pairs. touched: number of experts that have pairs. block: pairs of a block. split_k: in
    how many parts K is cut. extra: bytes of activations that the GEMM reads and writes.
    """
    tiles = blocks * (out_features // gemm_config.BLOCK_SIZE_N) * split_k
    instructions = (
        facts.tile_instructions + in_features // split_k // gemm_config.BLOCK_SIZE_K * facts.loop_instructions
    )
    rounds = math.ceil(tiles / (machine.device.num_sms * facts.programs_per_sm))
    return {
        "bytes": (touched * out_features * in_features * 9 / 16 + extra) / machine.bandwidth,
        "matmul": 2 * blocks * block * out_features * in_features / machine.matmul,
        "issue": tiles * gemm_config.num_warps * instructions / machine.instructions,
        "program": rounds * instructions * machine.cycles / machine.clock,
    }


def predict(machine: Machine, compiled: Compiled, layer: Layer, kind: str, num_tokens: int) -> dict[str, object]:
    """Return a row of the table: a batch's microseconds, its floors of bytes and arithmetic, what bounds its GEMMs."""
    shape = shape_of(layer)
    hidden_size, intermediate_size = shape.hidden_size, shape.intermediate_size
    seconds, bounds, ids = 0.0, [], layer.choose(kind, num_tokens)
    for start in range(0, num_tokens, TOKENS_AT_ONCE):
        part = ids[start : start + TOKENS_AT_ONCE]
        plan = make_plan(machine.device, shape, len(part), TOP_K, GLOBAL_EXPERTS)
        here = layer.pairs_here(part)
        counts = here.bincount(minlength=shape.num_experts)
        block = plan.config.BLOCK_SIZE_M
        blocks = int(((counts + block - 1) // block).sum()) if plan.sorted else len(here)
        touched, pairs = int((counts > 0).sum()), len(here)
        weighted = plan.split_w2 * plan.weighted.itemsize * hidden_size * pairs
        activated, partial = 2 * pairs * intermediate_size, 4 * plan.split_w13 * 2 * intermediate_size
        written = activated if plan.split_w13 == 1 else pairs * partial
        gemms = (
            (True, plan.config.w13, plan.split_w13, 2 * pairs * hidden_size + written),
            (False, plan.config.w2, plan.split_w2, activated + weighted),
        )
        for gated, gemm_config, split_k, extra in gemms:
            features = (2 * intermediate_size, hidden_size) if gated else (hidden_size, intermediate_size)
            facts = compiled.of(layer, plan, gated)
            floors = gemm_seconds(machine, facts, gemm_config, *features, blocks, touched, block, split_k, extra)
            bound = max(floors, key=lambda name: floors[name])
            seconds += floors[bound]
            bounds.append(bound)
        launches = 3 + plan.sorted + (plan.num_pairs > PAIRS_AT_ONCE) + (plan.split_w13 > 1)
        summed = weighted + 2 * len(part) * hidden_size
        if plan.split_w13 > 1:
            # The kernel that sums the split-K partials also sums those of pairs whose experts are on other ranks.
            summed += plan.num_pairs * (partial + 2 * intermediate_size)
        seconds += machine.launch + (launches - 1) * machine.dependent_launch + summed / machine.bandwidth
    touched = len(layer.pairs_here(ids).unique())
    return {
        "layer": layer.name,
        "routing": kind,
        "tokens": num_tokens,
        "microseconds": round(seconds * 1e6, 1),
        "bytes_floor": round(touched * layer.expert_bytes / machine.bandwidth * 1e6, 1),
        "matmul_floor": round(layer.flops(len(layer.pairs_here(ids))) / machine.matmul * 1e6, 1),
        "bound": "/".join(bounds[:2]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write bench/results/predicted-H200.json")
    save = parser.parse_args().save
    compiled = Compiled()
    rows = [
        predict(H200, compiled, layer, kind, num_tokens)
        for layer in LAYERS.values()
        for kind in ("uniform", "zipf")
        for num_tokens in TOKENS
    ]
    print("PREDICTED, not measured. µs, and the floors of bytes and of arithmetic; what bounds w13/w2.")
    for row in rows:
        print(
            f"{row['layer']:6} {row['routing']:8} {row['tokens']:6} {row['microseconds']:9} "
            f"{row['bytes_floor']:9} {row['matmul_floor']:9}  {row['bound']}"
        )
    if save:
        file = Path(__file__).parent / "results" / "predicted-H200.json"
        head = json.dumps({"predicted": True, "gpu": H200.device.name, "triton": triton.__version__})
        lines = ",\n  ".join(json.dumps(row) for row in rows)
        file.write_text(f'{head[:-1]}, "rows": [\n  {lines}\n]}}\n')


if __name__ == "__main__":
    main()
