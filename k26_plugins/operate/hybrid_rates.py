"""Measure, in a few seconds, the rates of this machine that decide the speed of a hybrid run.

The rates are those of the experts on the CPU, of the links from host memory to the GPUs, and of a GEMM on a GPU.
"""

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
# Experts that are timed with many tokens. A few are enough: arithmetic then takes longer than reading the weights, so
# it does not matter whether the caches hold them.
WITH_MANY_TOKENS = 4
PRODUCT = 8192
"""Rows and columns of the square matrices that the GPU multiplies."""


def measure(text: TextConfig) -> Rates:
    """Measure the rates of this machine, with experts of the sizes in `text` on this process's cores.

    The weights are random and take at most about a quarter of the available memory. Raises ExpertsError if no backend
    for experts can run here.
    """
    return Rates(host=host_line(text), link=links_rate(), gpu_gemm=gpu_gemm_rate())


def host_line(text: TextConfig) -> Line:
    """Return the seconds of one expert on the CPU as a line over its tokens, with the backend that a hybrid run takes.

    Raises ExpertsError if no backend can run here.
    """
    one = random_experts(1, text.hidden_size, text.moe_intermediate_size, "cpu")
    # Enough experts that the caches keep few of their weights from one call to the next, but no more than a layer has.
    count = max(WITH_MANY_TOKENS, min(beyond_caches() // expert_bytes(text), text.n_routed_experts))
    weights = ExpertWeights(*(part.repeat(count, *[1] * (part.dim() - 1)) for part in one.parts()))
    experts = create_experts(weights, CPU_EXPERTS.read())
    few, many = MEASURED_TOKENS
    return Line.through(_seconds_each(experts, text, count, few), _seconds_each(experts, text, WITH_MANY_TOKENS, many))


def links_rate() -> float | None:
    """Return the bytes per second from pinned host memory to all GPUs at once, or None without a GPU."""
    return copy_rate(range(torch.cuda.device_count())) if torch.cuda.is_available() else None


def gpu_gemm_rate() -> float | None:
    """Return the operations per second of a large bfloat16 GEMM on the first GPU, or None without a GPU."""
    if not torch.cuda.is_available():
        return None
    matrix = torch.randn(PRODUCT, PRODUCT, device="cuda").to(torch.bfloat16)

    def multiply() -> None:
        matrix.matmul(matrix)
        torch.cuda.synchronize()

    return 2 * PRODUCT**3 / _fastest(multiply)


def _seconds_each(experts: ExpertsBackend, text: TextConfig, count: int, tokens_each: int) -> float:
    """Return the seconds per expert of a batch in which each of the first `count` experts gets `tokens_each` tokens."""
    x = torch.randn(count * tokens_each, text.hidden_size).to(torch.bfloat16)
    ids = torch.arange(count, dtype=torch.int32).repeat(tokens_each).unsqueeze(1)
    weights = torch.ones(len(x), 1)
    return _fastest(lambda: experts.apply(x, ids, weights)) / count


def _fastest(run: Callable[[], object]) -> float:
    """Return the seconds of the fastest of ROUNDS runs, after one run that warms up."""
    run()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
