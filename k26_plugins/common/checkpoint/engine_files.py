"""Map the files that an engine's weight loader has chosen, in place of the engine's own iterator over their tensors.

An engine finds, downloads and filters the files; one of its functions then yields their tensors, for every model. While
one of our models is loaded, `engine_files` takes the place of that function. One rank logs the progress for all ranks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from k26_plugins.common.checkpoint.expert_names import ExpertKind, ExpertNames, expert_names
from k26_plugins.common.checkpoint.mapped import mapped_tensors
from k26_plugins.common.model.config import K26Config

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Logs how many bytes have been loaded, how fast, and the time that is left."""

    def __init__(
        self, num_bytes: int, say: Callable[[str], object], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.num_bytes, self.done = num_bytes, 0
        self._say, self._clock = say, clock
        self._start = self._said = clock()

    def advance(self, count: int) -> None:
        """Count `count` more bytes as loaded; write a line if the last one is at least SECONDS_BETWEEN_LINES old."""
        self.done += count
        now = self._clock()
        if now - self._said >= SECONDS_BETWEEN_LINES:
            self._said = now
            left = (self.num_bytes - self.done) * (now - self._start) / self.done
            self._say(f"weights: {_gb(self.done)} of {_gb(self.num_bytes)} GB, {self._rate(now)}, {left:.0f} s left")

    def end(self) -> None:
        """Write the last line: how much was loaded, how long it took, and how fast it was."""
        now = self._clock()
        self._say(f"weights: {_gb(self.done)} GB in {now - self._start:.1f} s, {self._rate(now)}")

    def _rate(self, now: float) -> str:
        return f"{self.done / 1e9 / max(now - self._start, 1e-9):.2f} GB/s"


class _Load:
    """A load of one of our models that is in progress."""

    def __init__(
        self, config: K26Config, is_needed: Callable[[ExpertKind, int], bool] | None, num_experts: int
    ) -> None:
        self.names: ExpertNames = expert_names(config)
        self.is_needed = is_needed
        self.num_experts = num_experts


_under_way: list[_Load] = []


def with_mapped_files(
    weights: Iterable[tuple[str, torch.Tensor]],
    config: K26Config,
    is_needed: Callable[[ExpertKind, int], bool] | None = None,
    num_experts: int | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the engine's weights unchanged; files that the engine opens meanwhile are mapped by `engine_files`.

    is_needed: returns whether this rank keeps any part of the given expert's tensor; a tensor that it does not keep is
    not read ahead. By default all are kept. num_experts: how many experts of each layer the engine loads, by default
    all.
    """
    load = _Load(config, is_needed, config.text.n_routed_experts if num_experts is None else num_experts)
    _under_way.append(load)
    try:
        yield from weights
    finally:
        _under_way.remove(load)


def is_under_way() -> bool:
    """Return whether an engine is loading one of our models in this process now."""
    return bool(_under_way)


def num_experts_under_way() -> int | None:
    """Return how many experts of each layer the load in progress loads, or None if none is in progress."""
    return _under_way[-1].num_experts if _under_way else None


def engine_files(
    files: Sequence[str], logger: logging.Logger, experts: Iterable[int] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and tensor of every tensor in the files, for the load in progress.

    experts: the checkpoint's experts that the engine wants, by default all; the tensors of other experts are left out.
    """
    load = _under_way[-1]
    chosen = None if experts is None else set(experts)

    def is_wanted(name: str) -> bool:
        found = load.names.expert_tensor(name)
        return chosen is None or found is None or found[1] in chosen

    def is_read(name: str) -> bool:
        found = load.names.expert_tensor(name)
        return is_wanted(name) and (found is None or load.is_needed is None or load.is_needed(*found))

    paths = [Path(file) for file in files]
    first = not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0
    say = logger.info if first else logger.debug
    progress = Progress(sum(path.stat().st_size for path in paths if path.exists()), say)
    reads_all = chosen is None and load.is_needed is None
    tensors = mapped_tensors(paths, None if reads_all else is_read, progress.advance)
    yield from tensors if chosen is None else ((name, tensor) for name, tensor in tensors if is_wanted(name))
    progress.end()


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f}"
