"""How long a device takes, captured in a CUDA graph where an engine would capture it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

# The seconds of a function; captured in a graph first if the second argument is true.
Clock = Callable[[Callable[[], object], bool], float]


def clock_of(device: torch.device, repeats: int = 5) -> Clock:
    """The fastest of several runs, after one that compiles."""

    def on_gpu(run: Callable[[], object], graph: bool) -> float:
        timed = in_graph(run) if graph else run
        timed()
        times = []
        for _ in range(repeats):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            timed()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return float(min(times))

    def on_host(run: Callable[[], object], graph: bool) -> float:
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    return on_gpu if device.type == "cuda" else on_host


def in_graph(run: Callable[[], object]) -> Callable[[], object]:
    """The replay of a CUDA graph of `run`."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    replay: Callable[[], object] = graph.replay
    return replay
