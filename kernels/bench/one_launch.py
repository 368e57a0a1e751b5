"""Run each kernel once and compare it with its plain reference, for a sanitizer or a profiler, which make runs slow.

    compute-sanitizer --tool memcheck python -m bench.one_launch
    ncu --kernel-name moe_gemm_kernel --set full python -m bench.one_launch --layer tp8 --tokens 64

Without --layer the experts are small, and three batches reach every kernel: a batch of one token (cut along K), one
whose pairs are sorted by one launch, and one that needs several launches to sort. With --layer, one batch runs on a
rank's real sizes.
"""

from __future__ import annotations

import argparse

import torch
from bench.layers import LAYERS
from k26_kernels import KernelExperts, batched_experts, fused_experts
from k26_kernels.reference import batched_experts_reference, fused_experts_reference

from k26_plugins.operate.tune.measure import random_weights
from k26_plugins.operate.tune.routing import Layer

SMALL = Layer("small", 1024, 128, 6, global_experts=6, top_k=2)
TOLERANCE = 1e-2


def load(layer: Layer, device: torch.device) -> KernelExperts:
    """Return the layer's experts with random weights, as the kernels store them."""
    weights = random_weights(layer, device)
    return KernelExperts.from_checkpoint(*weights.parts())


def compare(name: str, result: torch.Tensor, expected: torch.Tensor) -> None:
    """Print the relative error of a result. Raises SystemExit if it is larger than TOLERANCE."""
    error = ((result.double() - expected.double()).norm() / expected.double().norm()).item()
    print(f"{name}: error {error:.1e}", flush=True)
    if not error <= TOLERANCE:
        raise SystemExit(f"{name} is wrong")


def small_ones(device: torch.device, batches: tuple[int, ...] = (1, 20, 520)) -> None:
    """Run every kernel on small experts, and compare the results with the reference. batches: tokens of each batch."""
    experts = load(SMALL, device)
    for tokens in batches:
        batch = SMALL.batches("uniform", tokens, device)[0]
        arguments = batch.hidden_states, experts, batch.topk_ids, batch.topk_weights
        compare(f"experts, {tokens} tokens", fused_experts(*arguments), fused_experts_reference(*arguments))
    buffers = torch.randn(SMALL.num_experts, 20, SMALL.hidden_size, device=device).bfloat16()
    counts = torch.arange(SMALL.num_experts, dtype=torch.int32, device=device)
    found = torch.zeros_like(buffers)
    batched_experts(buffers, experts, counts, found, expected=3)
    compare("experts on buffers of their own", found, batched_experts_reference(buffers, experts, counts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", choices=LAYERS)
    parser.add_argument("--tokens", type=int, default=1)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench.one_launch needs a GPU and finds none.")
    device = torch.device("cuda")
    if arguments.layer is None:
        small_ones(device)
        return
    layer = LAYERS[arguments.layer]
    batch = layer.batches("uniform", arguments.tokens, device)[0]
    local = layer.expert_map(device)
    fused_experts(batch.hidden_states, load(layer, device), batch.topk_ids, batch.topk_weights, expert_map=local)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
