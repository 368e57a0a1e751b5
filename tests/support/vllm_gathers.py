"""Gives vLLM's communicator for CPUs the collectives of data parallelism, to test it without GPUs.

The server takes `--worker-extension-cls support.vllm_gathers.Worker`. Ranks that share the experts gather all their
tokens and then sum the results, and one rank may have more tokens than another. On GPUs vLLM does both with NCCL; here
Gloo does them, so that a server on a CPU takes the same path as one on GPUs.
"""

from __future__ import annotations

import torch
from torch import distributed
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator


class Worker:
    """An empty extension, which makes vLLM import this module in each of its workers."""


def all_gatherv(
    self: CpuCommunicator, input_: torch.Tensor | list[torch.Tensor], dim: int = 0, sizes: list[int] | None = None
) -> torch.Tensor | list[torch.Tensor]:
    """Return the rows of all ranks, in the ranks' order, for one tensor or for each of a list.

    sizes: how many rows each rank has; None: all have as many as this one.
    """
    assert dim == 0
    if isinstance(input_, list):
        return [_gathered(self, one, sizes) for one in input_]
    return _gathered(self, input_, sizes)


def _gathered(self: CpuCommunicator, input_: torch.Tensor, sizes: list[int] | None) -> torch.Tensor:
    counts = sizes or [len(input_)] * self.world_size
    # Gloo can only gather tensors of one size.
    padded = input_.new_zeros(max(counts), *input_.shape[1:])
    padded[: len(input_)] = input_
    found = [torch.empty_like(padded) for _ in counts]
    distributed.all_gather(found, padded, group=self.device_group)
    return torch.cat([one[:count] for one, count in zip(found, counts, strict=True)])


def reduce_scatterv(
    self: CpuCommunicator, input_: torch.Tensor, dim: int = 0, sizes: list[int] | None = None
) -> torch.Tensor:
    """Return this rank's rows of the sum over all ranks.

    sizes: how many rows each rank has; None: all have the same number.
    """
    assert dim == 0
    counts = sizes or [len(input_) // self.world_size] * self.world_size
    total = input_.float()
    distributed.all_reduce(total, group=self.device_group)
    return total.split(counts)[self.rank_in_group].to(input_.dtype)


assert "all_gatherv" not in vars(CpuCommunicator), "vLLM has it now: leave this out"
CpuCommunicator.all_gatherv, CpuCommunicator.reduce_scatterv = all_gatherv, reduce_scatterv
