"""What this machine does in a second for a hybrid run, measured in a few seconds: its CPU's experts, its links, its GPUs."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from k26_plugins.common.checkpoint import expert_bytes
from k26_plugins.common.expert_costs import MEASURED_TOKENS, Line
from k26_plugins.common.experts import ExpertsBackend, ExpertWeights, create_experts
from k26_plugins.common.model.config import TextConfig
from k26_plugins.common.settings import CPU_EXPERTS
from k26_plugins.operate.doctor.bandwidth import beyond_caches, copy_rate
from k26_plugins.operate.plan.hybrid_speed import Rates
from k26_plugins.operate.random_experts import random_experts

ROUNDS = 5
# Experts whose prompts are timed: their arithmetic takes longer than their reading.
WITH_MANY_TOKENS = 4
PRODUCT = 8192
"""Rows and columns of a GPU's product."""


def measure(text: TextConfig) -> Rates:
    """Measure experts of this configuration on this process's cores. Raises ExpertsError where no backend can run here.

    Takes a quarter of the memory that is free at most.
    """
    return Rates(host=host_line(text), link=links_rate(), gpu_gemm=gpu_gemm_rate())


def host_line(text: TextConfig) -> Line:
    """Seconds of an expert on the CPU, by its tokens, with the backend that a hybrid run takes."""
    one = random_experts(1, text.hidden_size, text.moe_intermediate_size, "cpu")
    # So many that caches hold few of them from one call to the next, but no more than a layer has.
    count = max(WITH_MANY_TOKENS, min(beyond_caches() // expert_bytes(text), text.n_routed_experts))
    weights = ExpertWeights(*(part.repeat(count, *[1] * (part.dim() - 1)) for part in one.parts()))
    experts = create_experts(weights, CPU_EXPERTS.read())
    few, many = MEASURED_TOKENS
    return Line.through(_seconds_each(experts, text, count, few), _seconds_each(experts, text, WITH_MANY_TOKENS, many))


def links_rate() -> float | None:
    """Bytes a second from pinned memory to all GPUs at once; None without one."""
    return copy_rate(range(torch.cuda.device_count())) if torch.cuda.is_available() else None


def gpu_gemm_rate() -> float | None:
    """Operations a second of a large bfloat16 GEMM on the first GPU; None without one."""
    if not torch.cuda.is_available():
        return None
    matrix = torch.randn(PRODUCT, PRODUCT, device="cuda").to(torch.bfloat16)

    def multiply() -> None:
        matrix.matmul(matrix)
        torch.cuda.synchronize()

    return 2 * PRODUCT**3 / _fastest(multiply)


def _seconds_each(experts: ExpertsBackend, text: TextConfig, count: int, tokens_each: int) -> float:
    """`tokens_each` tokens choose each of the first `count` experts."""
    x = torch.randn(count * tokens_each, text.hidden_size).to(torch.bfloat16)
    ids = torch.arange(count, dtype=torch.int32).repeat(tokens_each).unsqueeze(1)
    weights = torch.ones(len(x), 1)
    return _fastest(lambda: experts.apply(x, ids, weights)) / count


def _fastest(run: Callable[[], object]) -> float:
    """Seconds of the fastest of a few runs, after one that warms up."""
    run()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
