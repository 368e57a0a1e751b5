"""Compute the host's experts on the device: copy their weights there for one batch, a few experts at a time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch

from k26_plugins.common.experts.base import ExpertsBackend

# Bytes of weights that are copied at a time. The device holds two buffers of this size and what its backend needs to
# repack one of them.
CHUNK_BYTES = 128 * 2**20
# Dtype in which the results of the chunks are added up.
SUM_DTYPE = torch.float32
# cudaErrorHostMemoryAlreadyRegistered
ALREADY_REGISTERED = 712


class ExpertStream:
    """A stream of the host's experts to the device, which computes some experts while the next ones are copied.

    All layers of a process share one object, since they have the same sizes and run one after the other.
    """

    def __init__(self, host: ExpertsBackend, device: torch.device, backend: type[ExpertsBackend]) -> None:
        """host: the experts of any layer in host memory; every layer has as many there, of the same sizes.

        backend: computes the experts on the device.
        """
        self.device = device
        self.backend = backend
        stored = host.tensors()
        self.num_experts = len(next(iter(stored.values())))
        expert_bytes = sum(tensor[0].nbytes for tensor in stored.values())
        self.chunk = max(1, min(CHUNK_BYTES // expert_bytes, self.num_experts))
        self._buffers = [
            {
                name: torch.empty((self.chunk, *tensor.shape[1:]), dtype=tensor.dtype, device=device)
                for name, tensor in stored.items()
            }
            for _ in range(2)
        ]
        on_gpu = device.type == "cuda"
        self._copying = torch.cuda.Stream(device) if on_gpu else None
        self._copied, self._computed = ([torch.cuda.Event() for _ in range(2)] if on_gpu else [] for _ in range(2))

    def apply(
        self,
        host: ExpertsBackend,
        chosen: Sequence[int],
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        expert_map: torch.Tensor,
    ) -> torch.Tensor:
        """Return what the experts `chosen` add to the routed sum, float32 `[num_tokens, hidden_size]`, on the device.

        chosen: indices into the experts of `host`. expert_map: on the device, the index into them for each global id in
        `topk_ids`, or −1.
        """
        total = torch.zeros(hidden_states.shape, dtype=SUM_DTYPE, device=self.device)
        out = torch.empty_like(total)
        stored = host.tensors()
        for turn, start in enumerate(range(0, len(chosen), self.chunk)):
            part = list(chosen[start : start + self.chunk])
            rows = self._copy(stored, part, turn % 2)
            places = torch.full((self.num_experts + 1,), -1, dtype=torch.int32)  # index −1 reads the last entry, −1
            places[part] = torch.arange(len(part), dtype=torch.int32)
            experts = self.backend.load(host.restore(rows))
            chunk_map = places.to(self.device)[expert_map.long()]
            total += experts.apply(hidden_states, topk_ids, topk_weights, expert_map=chunk_map, out=out)
            if self._copying is not None:
                self._computed[turn % 2].record()
        return total

    def _copy(self, stored: dict[str, torch.Tensor], part: list[int], side: int) -> dict[str, torch.Tensor]:
        """Return a buffer whose first rows hold these experts.

        The whole buffer is computed with, so that kernels are compiled for one number of experts; no token chooses the
        experts that are left in the other rows.
        """
        rows = self._buffers[side]
        if self._copying is None:
            _copy_rows(stored, part, rows)
            return rows
        # The computation two chunks ago, or that of the layer before, may still read this buffer.
        self._copying.wait_event(self._computed[side])
        with torch.cuda.stream(self._copying):
            _copy_rows(stored, part, rows)
            self._copied[side].record()
        torch.cuda.current_stream(self.device).wait_event(self._copied[side])
        return rows


def _copy_rows(stored: dict[str, torch.Tensor], part: list[int], rows: dict[str, torch.Tensor]) -> None:
    for name, target in rows.items():
        for row, expert in zip(target, part, strict=False):
            row.copy_(stored[name][expert], non_blocking=True)


def pin(host: ExpertsBackend, device: torch.device) -> bool:
    """Pin the host's weights, so that the device copies from them by itself; return whether the system allowed it.

    If it did not, the copies are slow.
    """
    if device.type != "cuda":
        return True
    runtime = torch.cuda.cudart()
    codes = {int(runtime.cudaHostRegister(t.data_ptr(), t.nbytes, 0)) for t in host.tensors().values()}
    if codes <= {0}:
        return True
    with suppress(RuntimeError):
        torch.zeros(1, device=device)  # consumes the error, which the next launch would report as its own
    # After an update the weights are at the same addresses, which are registered already.
    return codes <= {0, ALREADY_REGISTERED}
