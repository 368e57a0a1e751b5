"""Decide which of the host's experts are streamed to the device for a batch: those for which that is faster."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from k26_plugins.common.expert_costs import MEASURED_TOKENS, Line, StreamCosts
from k26_plugins.common.experts import create_experts
from k26_plugins.common.experts.base import Batches, ExpertsBackend, LayerSizes
from k26_plugins.common.experts.streamed import ExpertStream, pin
from k26_plugins.common.settings import BATCH_INVARIANT

logger = logging.getLogger(__name__)

# Enough chunks that copies overlap with computation.
MEASURED_CHUNKS = 3
REPEATS = 2
# Tokens of each expert for which the log says what times to expect. With 384 experts and 8 for a token, these are
# batches of 768 and 12288 tokens.
REPORTED_TOKENS = (16, 256)


@dataclass(slots=True)
class Streaming:
    """The decision which experts to stream, and the stream that computes them, for all layers of a process.

    device_backend: as `create_experts` takes it. threshold: for a batch of at least this many tokens every expert that
    it uses is streamed, for a shorter one none; if None, the measured times decide. batches: the batches for which the
    device's backend compiles its kernels.
    """

    device_backend: str
    threshold: int | None = None
    batches: Batches | None = None
    costs: StreamCosts | None = field(default=None, init=False)
    _stream: ExpertStream | None = field(default=None, init=False)
    _off: bool = field(default=False, init=False)
    _said: bool = field(default=False, init=False)

    def prepare(self, host: ExpertsBackend, device: torch.device) -> ExpertStream | None:
        """Prepare a layer's host experts for streaming; the first call chooses, tests and times the device's backend.

        Returns the stream that computes the experts that `choose` returns, or None if there can be no streaming and
        every batch stays on the host. A warning says why, except where the device itself is a CPU.
        """
        # Streaming to a CPU gains nothing, whatever two measurements of the same CPU say.
        if self._off or (device.type == "cpu" and self.threshold is None):
            return None
        pinned = pin(host, device)
        if self._stream is None:
            started = self._start(host, device)
            if isinstance(started, str):
                self._off = True
                logger.warning("k26-plugins: long prompts are computed where the experts are: %s", started)
                return None
            self._stream = started
            self._report(started)
        if not pinned:
            logger.warning(
                "k26-plugins: the system does not let %s read the host's weights by itself (ulimit -l): long prompts on the "
                "CPU's experts take longer.",
                device,
            )
        return self._stream

    def choose(self, counts: Sequence[int], num_tokens: int) -> list[int]:
        """Return the indices of the host's experts that a batch is streamed for. counts: tokens of each host expert."""
        if self._stream is None:
            return []
        if self.costs is not None:
            chosen = self.costs.choose(counts)
        else:
            assert self.threshold is not None, "without a threshold there are costs"
            chosen = [expert for expert, count in enumerate(counts) if count] if num_tokens >= self.threshold else []
        if chosen and not self._said:
            self._said = True
            logger.info("k26-plugins: of %d tokens %d of the CPU's experts are streamed.", num_tokens, len(chosen))
        return chosen

    def _start(self, host: ExpertsBackend, device: torch.device) -> ExpertStream | str:
        """Return the stream, tested and timed, or why there can be none."""
        if BATCH_INVARIANT.read():
            return f"{BATCH_INVARIANT.variable} asks that a request's answer does not depend on the batch."
        if not host.tensors():
            return f"the CPU's experts ({host.name}) keep their weights to themselves."
        try:
            first = host.restore({name: rows[:1].to(device, copy=True) for name, rows in host.tensors().items()})
            hidden_size = first.hidden_size
            # The backend is chosen as for the device's own experts, and passes the self-test with the host's weights.
            backend = type(create_experts(first, self.device_backend))
            stream = ExpertStream(host, device, backend)
            if self.batches is not None:
                sizes = LayerSizes(stream.chunk, first.hidden_size, first.intermediate_size, device)
                backend.make_ready(sizes, self.batches)
            probe = Probe(host, stream, hidden_size)
            error = probe.error()
            if not error <= host.tolerance:
                return f"experts streamed to {device} differ from the CPU's by {error:.2g}."
            if self.threshold is None:
                self.costs = probe.costs()
        except Exception as failure:  # whatever a compiler or a driver raises: the host still serves
            return f"{type(failure).__name__} on {device}: {failure}"
        return stream

    def _report(self, stream: ExpertStream) -> None:
        if self.costs is None:
            return
        for each in REPORTED_TOKENS:
            counts = [each] * stream.num_experts
            logger.info(
                "k26-plugins: %d tokens for each of %d experts on the CPU: %.1f ms a layer, with %d of them streamed to %s "
                "%.1f ms, as measured.",
                each,
                stream.num_experts,
                1e3 * sum(map(self.costs.host.seconds, counts)),
                len(self.costs.choose(counts)),
                stream.device,
                1e3 * self.costs.predict(counts),
            )


class Probe:
    """A few of the host's experts, computed on the host and on the device to compare results and times."""

    def __init__(self, host: ExpertsBackend, stream: ExpertStream, hidden_size: int) -> None:
        self.host, self.stream, self.hidden_size = host, stream, hidden_size
        self.experts = list(range(min(MEASURED_CHUNKS * stream.chunk, stream.num_experts)))

    def error(self) -> float:
        """Return ‖streamed − host‖ / ‖host‖ for one batch."""
        on_host, streamed = self._runs(8)
        expected = on_host().float()
        return float((streamed().cpu() - expected).norm() / expected.norm())

    def costs(self) -> StreamCosts:
        """Measure both sides with few and with many tokens, and return a line through each side's two times."""
        seconds = [[self._seconds(run) / len(self.experts) for run in self._runs(n)] for n in MEASURED_TOKENS]
        (host_few, stream_few), (host_many, stream_many) = seconds
        return StreamCosts(Line.through(host_few, host_many), Line.through(stream_few, stream_many))

    def _runs(self, tokens_each: int) -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]:
        count = tokens_each * len(self.experts)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(count, self.hidden_size, generator=generator).to(torch.bfloat16)
        ids = torch.tensor(self.experts, dtype=torch.int32).repeat(tokens_each).unsqueeze(1)
        weights = torch.ones(count, 1)
        device = self.stream.device
        there = (x.to(device), ids.to(device), weights.to(device))
        identity = torch.arange(self.stream.num_experts, dtype=torch.int32, device=device)
        return (
            lambda: self.host.apply(x, ids, weights),
            lambda: self.stream.apply(self.host, self.experts, *there, expert_map=identity),
        )

    def _seconds(self, run: Callable[[], torch.Tensor]) -> float:
        """Return the seconds of the fastest of several runs, after one that warms up."""
        run()
        times = []
        for _ in range(REPEATS):
            self._synchronize()
            start = time.perf_counter()
            run()
            self._synchronize()
            times.append(time.perf_counter() - start)
        return min(times)

    def _synchronize(self) -> None:
        if self.stream.device.type == "cuda":
            torch.cuda.synchronize(self.stream.device)
