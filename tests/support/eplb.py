"""Lets an engine's own EPLB code move experts between two ranks, and compares what they compute before and after.

Each rank is a process. `support.vllm_eplb` and `support.sglang_eplb` hold the engine's part; `support.experts.judge`
says what is right.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from support.experts import error, inputs, judge, make_weights, route
from support.server import free_port

from k26_plugins.common.experts import BACKENDS
from k26_plugins.common.experts.base import Expert
from k26_plugins.common.experts.parameters import PACKED_NAMES, LayerExperts

RANKS, LAYERS, EXPERTS, PLACES, HIDDEN, INNER = 2, 2, 8, 10, 128, 64
LOCAL = PLACES // RANKS
# The sizes of a decode batch and of a prefill.
TOKENS = (1, 70)
TOLERANCE = 6e-3


def assert_moved_experts_compute_as_before(engine: str) -> None:
    """Assert, for every backend that this machine can run, that the ranks together compute as before the move."""
    weights = make_weights(1, HIDDEN, INNER)
    backends = [name for name, backend in BACKENDS.items() if backend.unsupported(weights) is None]
    context = multiprocessing.get_context("spawn")
    said, port = context.Queue(), free_port()
    ranks = [context.Process(target=_rank, args=(rank, port, engine, backends, said)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    found = [said.get(timeout=240) for _ in ranks]
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    for one in found:
        assert one.keys() == set(backends)
        for before, after, moved in one.values():
            assert max(*before, *after) <= TOLERANCE
            assert moved >= 5


def _rank(rank: int, port: int, engine: str, backends: list[str], said: Any) -> None:
    """Put what `_move` returns, by backend, into `said`."""
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=RANKS, rank=rank)
    said.put({backend: _move(rank, import_module(f"support.{engine}_eplb"), backend) for backend in backends})
    dist.barrier()
    dist.destroy_process_group()


def _move(rank: int, engine: Any, backend: str) -> tuple[list[float], list[float], int]:
    """Return the errors of both ranks' joint results before the move and after it, and how many slots changed."""
    mine = slice(rank * LOCAL, (rank + 1) * LOCAL)
    all_weights = [make_weights(EXPERTS, HIDDEN, INNER, seed=layer) for layer in range(LAYERS)]
    # At the start engines put the experts into the first slots in order, and the redundant copies after them.
    old = (torch.arange(PLACES) % EXPERTS).repeat(LAYERS, 1)
    layers: list[LayerExperts] = []
    for layer, weights in enumerate(all_weights):
        experts = LayerExperts(engine.Layer(), LOCAL, HIDDEN, INNER, backend, lambda parameter: None)
        for name, field in zip(PACKED_NAMES, Expert._fields, strict=True):
            experts.layer.get_parameter(name).data.copy_(getattr(weights, field)[old[layer, mine]])
        experts.close()
        layers.append(experts)

    def errors(places: torch.Tensor) -> Iterator[float]:
        expert_map = torch.full((PLACES,), -1, dtype=torch.int32)
        expert_map[mine] = torch.arange(LOCAL, dtype=torch.int32)
        for experts, weights, held in zip(layers, all_weights, places, strict=True):
            for count in TOKENS:
                x, (ids, topk_weights) = inputs(count, HIDDEN), route(count, 2, EXPERTS)
                # Each token goes to the last slot that holds its expert, which is a copy where there is one.
                last = torch.stack([(held == expert).nonzero()[-1, 0] for expert in range(EXPERTS)])
                part = torch.empty_like(x)
                experts.apply(part, x, topk_weights, last[ids.long()].to(torch.int32), expert_map)
                whole = part.float()
                dist.all_reduce(whole)
                yield error(whole, judge(weights, x, ids, topk_weights))

    before = list(errors(old))
    load = torch.rand(LAYERS, EXPERTS, generator=torch.Generator().manual_seed(0)) ** 3
    new = engine.rebalanced(load, old)
    engine.move([experts.layer for experts in layers], old, new, rank)
    return before, list(errors(new)), int((old != new).sum())
