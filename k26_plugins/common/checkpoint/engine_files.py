"""The files that an engine's loader of checkpoints has chosen, mapped in the place of the engine's own iterator.

An engine finds, downloads and filters the files; one function of its gives their tensors, for every model. Ours takes its
place while a model of ours is loaded, and says once, not by rank, how far it is.
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
    """Says in a log how many bytes were loaded, how fast, and what time is left."""

    def __init__(
        self, num_bytes: int, say: Callable[[str], object], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.num_bytes, self.done = num_bytes, 0
        self._say, self._clock = say, clock
        self._start = self._said = clock()

    def advance(self, count: int) -> None:
        """Count `count` bytes more as loaded; a line is written where the last one is old enough."""
        self.done += count
        now = self._clock()
        if now - self._said >= SECONDS_BETWEEN_LINES:
            self._said = now
            left = (self.num_bytes - self.done) * (now - self._start) / self.done
            self._say(f"weights: {_gb(self.done)} of {_gb(self.num_bytes)} GB, {self._rate(now)}, {left:.0f} s left")

    def end(self) -> None:
        """Write the last line: how much was loaded, and how long it took."""
        now = self._clock()
        self._say(f"weights: {_gb(self.done)} GB in {now - self._start:.1f} s, {self._rate(now)}")

    def _rate(self, now: float) -> str:
        return f"{self.done / 1e9 / max(now - self._start, 1e-9):.2f} GB/s"


class _Load:
    """A load of one of our models that is under way."""

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
    """Pass the engine's weights on; files that it opens meanwhile are mapped by us.

    is_needed: whether this rank keeps any of a routed expert's tensor, else it is not read ahead; all if not given.
    num_experts: of each layer that the engine gives, all if not said.
    """
    load = _Load(config, is_needed, config.text.n_routed_experts if num_experts is None else num_experts)
    _under_way.append(load)
    try:
        yield from weights
    finally:
        _under_way.remove(load)


def is_under_way() -> bool:
    """Whether an engine is loading this model in this process now."""
    return bool(_under_way)


def num_experts_under_way() -> int | None:
    """How many experts of each layer are loaded by the load under way, None where there is none."""
    return _under_way[-1].num_experts if _under_way else None


def engine_files(
    files: Sequence[str], logger: logging.Logger, experts: Iterable[int] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the files, for the load that is under way.

    experts: those of the checkpoint's experts that the engine wants, all if not given; others are left out.
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
