"""The host's experts computed on the device: their weights are copied there for one batch, a few experts at a time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch

from k26_plugins.common.experts.base import ExpertsBackend

# Weights that are copied at a time. Two such buffers, and what the device's backend needs to repack them, are all that
# the device holds.
CHUNK_BYTES = 128 * 2**20
# What is added up over the chunks is held in it.
SUM_DTYPE = torch.float32
# cudaErrorHostMemoryAlreadyRegistered
ALREADY_REGISTERED = 712


class ExpertStream:
    """Copies experts to the device and computes them there, the next ones' copy beside the computation.

    One for all layers of a process: they have the same sizes and run one after the other.
    """

    def __init__(self, host: ExpertsBackend, device: torch.device, backend: type[ExpertsBackend]) -> None:
        """host: any layer's experts in the host's memory; the others have as many, of the same sizes.

        backend: computes on the device.
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
        """The part that the experts `chosen` have in the routed sum, float32 `[num_tokens, hidden_size]`, on the device.

        chosen: places in `host`, of which expert_map, on the device, gives those of the global ids in `topk_ids`.
        """
        total = torch.zeros(hidden_states.shape, dtype=SUM_DTYPE, device=self.device)
        out = torch.empty_like(total)
        stored = host.tensors()
        for turn, start in enumerate(range(0, len(chosen), self.chunk)):
            part = list(chosen[start : start + self.chunk])
            rows = self._copy(stored, part, turn % 2)
            places = torch.full((self.num_experts + 1,), -1, dtype=torch.int32)  # −1 points to the last
            places[part] = torch.arange(len(part), dtype=torch.int32)
            experts = self.backend.load(host.restore(rows))
            chunk_map = places.to(self.device)[expert_map.long()]
            total += experts.apply(hidden_states, topk_ids, topk_weights, expert_map=chunk_map, out=out)
            if self._copying is not None:
                self._computed[turn % 2].record()
        return total

    def _copy(self, stored: dict[str, torch.Tensor], part: list[int], side: int) -> dict[str, torch.Tensor]:
        """A buffer with these experts in its first places. It is computed with as a whole, so that kernels are compiled for
        one number of experts; no token chooses what is left in the others."""
        rows = self._buffers[side]
        if self._copying is None:
            _copy_rows(stored, part, rows)
            return rows
        # The buffer was computed from two chunks ago, or by the layer before.
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
    """Let the device copy from the host's weights by itself. False where the system refuses: the copies are then slow."""
    if device.type != "cuda":
        return True
    runtime = torch.cuda.cudart()
    codes = {int(runtime.cudaHostRegister(t.data_ptr(), t.nbytes, 0)) for t in host.tensors().values()}
    if codes <= {0}:
        return True
    with suppress(RuntimeError):
        torch.zeros(1, device=device)  # takes up the error, which the next launch would report as its own
    # After an update the weights lie where they lay.
    return codes <= {0, ALREADY_REGISTERED}
