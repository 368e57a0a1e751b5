"""Measure how long a device takes, in a CUDA graph where an engine would capture one."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

# Takes a function, and whether to capture the function in a CUDA graph first. Returns the seconds that one call takes.
Clock = Callable[[Callable[[], object], bool], float]


RUNS = 5


def clock_of(device: torch.device) -> Clock:
    """Return the clock for a device.

    On a GPU the clock gives the fastest of five runs, after one run in which kernels are compiled. On any other
    device it gives the seconds of a single run, and captures nothing.
    """

    def on_gpu(run: Callable[[], object], graph: bool) -> float:
        timed = in_graph(run) if graph else run
        timed()
        times = []
        for _ in range(RUNS):
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
    """Capture `run` in a CUDA graph, and return the function that replays the graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    replay: Callable[[], object] = graph.replay
    return replay
