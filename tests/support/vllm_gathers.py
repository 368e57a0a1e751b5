"""What vLLM's communicator for CPUs lacks for data parallel: `--worker-extension-cls support.vllm_gathers.Worker`.

Ranks with experts between them gather their tokens and sum what became of them, of which one rank may have more than
another. vLLM does it with NCCL on GPUs; here Gloo does it, so that a server on a CPU goes the way of one on GPUs.
"""

from __future__ import annotations

import torch
from torch import distributed
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator


class Worker:
    """vLLM imports this module in each of its workers."""


def all_gatherv(
    self: CpuCommunicator, input_: torch.Tensor | list[torch.Tensor], dim: int = 0, sizes: list[int] | None = None
) -> torch.Tensor | list[torch.Tensor]:
    """sizes: how many rows each rank has."""
    assert dim == 0
    if isinstance(input_, list):
        return [_gathered(self, one, sizes) for one in input_]
    return _gathered(self, input_, sizes)


def _gathered(self: CpuCommunicator, input_: torch.Tensor, sizes: list[int] | None) -> torch.Tensor:
    counts = sizes or [len(input_)] * self.world_size
    # Gloo gathers tensors of one size.
    padded = input_.new_zeros(max(counts), *input_.shape[1:])
    padded[: len(input_)] = input_
    found = [torch.empty_like(padded) for _ in counts]
    distributed.all_gather(found, padded, group=self.device_group)
    return torch.cat([one[:count] for one, count in zip(found, counts, strict=True)])


def reduce_scatterv(
    self: CpuCommunicator, input_: torch.Tensor, dim: int = 0, sizes: list[int] | None = None
) -> torch.Tensor:
    """The sum over the ranks, of which this one keeps its own rows."""
    assert dim == 0
    counts = sizes or [len(input_) // self.world_size] * self.world_size
    total = input_.float()
    distributed.all_reduce(total, group=self.device_group)
    return total.split(counts)[self.rank_in_group].to(input_.dtype)


assert "all_gatherv" not in vars(CpuCommunicator), "vLLM has it now: leave this out"
CpuCommunicator.all_gatherv, CpuCommunicator.reduce_scatterv = all_gatherv, reduce_scatterv
