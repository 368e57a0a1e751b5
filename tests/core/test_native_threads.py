"""Tests of the native experts' threads: on which cores they run, calls from several threads, forks, and the end of a
process."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from support.experts import inputs, make_weights, route
from support.native_experts import load, needs_native, run_apart

from k26_plugins.common.experts.native.build import library
from k26_plugins.common.experts.native.threads import Threads, process_threads
from k26_plugins.common.host import cores
from k26_plugins.common.host.cores import Core


def test_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine has eight CPUs on two nodes; CPUs i and i + 4 are the two threads of a core."""
    monkeypatch.setattr(cores, "allowed_cpus", lambda: {1, 2, 3, 4, 5, 6, 7})
    monkeypatch.setattr(cores, "_read", lambda file: str(int(file.parts[-3][3:]) % 4))
    monkeypatch.setattr(cores, "_node", lambda cpu: cpu % 4 // 2)
    assert cores.cores() == [Core(0, 1), Core(0, 4), Core(1, 2), Core(1, 3)]
    assert cores.cores(2) == [Core(0, 1), Core(1, 2)]


def test_cores_of_a_rank_whose_threads_are_pinned_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's and SGLang's CPU workers pin each of their threads in this way. A thread that is not pinned does not
    count."""
    monkeypatch.setattr(cores, "_affinities", lambda: [{2}, {3}, {0, 1, 2, 3}])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2})
    assert cores.allowed_cpus() == {2, 3}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert cores.allowed_cpus() == {0, 1}


@needs_native
def test_the_setting_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K26_CPU_THREADS", "0")
    with pytest.raises(ValueError, match="K26_CPU_THREADS is '0'"):
        Threads(library())
    monkeypatch.setenv("K26_CPU_THREADS", "1")
    Threads(library()).start_pool()
    assert process_threads() is process_threads()


@needs_native
def test_whose_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    two = [Core(0, 0), Core(0, 1)]
    for torch_threads, chosen, team in ((4, two, 4), (1, two, 0), (1, two[:1], 1)):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=torch_threads: count)
        assert Threads(library(), pool=chosen).team == team


@needs_native
def test_calls_from_several_threads() -> None:
    layers = [load(make_weights(4, 128, 64, seed)) for seed in range(3)]
    ids, topk_weights = route(33, 2, 4)
    x = inputs(33, 128)
    expected = [layer.apply(x, ids, topk_weights) for layer in layers]
    wrong: list[int] = []

    def work(number: int) -> None:
        for turn in range(30):
            layer = (number + turn) % 3
            result = (
                layers[layer].submit(x, ids, topk_weights)() if turn % 2 else layers[layer].apply(x, ids, topk_weights)
            )
            if not torch.equal(result, expected[layer]):
                wrong.append(layer)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@needs_native
def test_a_forked_child_computes() -> None:
    experts = load(make_weights(4, 128, 64))
    ids, topk_weights = route(5, 2, 4)
    x = inputs(5, 128)
    expected = experts.apply(x, ids, topk_weights)
    left_over = experts.submit(x, ids, topk_weights)
    child = os.fork()
    if child == 0:
        # pytest must not run on in the child, whatever happens.
        try:
            same = torch.equal(experts.apply(x, ids, topk_weights), expected)
            del left_over
            os._exit(0 if same else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(left_over(), expected)


@needs_native
def test_a_process_ends_with_work_in_flight() -> None:
    program = (
        "import torch; from support.experts import *; from k26_plugins.common.experts.native import NativeExperts\n"
        "experts = NativeExperts.load(make_weights(4, 256, 256)); ids, weights = route(200, 2, 4)\n"
        "wait = experts.submit(inputs(200, 256), ids, weights)\n"
    )
    done = run_apart(program)
    assert "Exception ignored" not in done.stderr
