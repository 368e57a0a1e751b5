"""Tests that a rank without the plugin, or with another version of it, stops the start. The ranks are real processes of
torch.distributed."""

from __future__ import annotations

import multiprocessing
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist
from support.server import free_port

from k26_plugins.common.adapters import ranks


def rank(number: int, port: int, version: str | None, said: Any) -> None:
    """Start one of two ranks with this version of the plugin (None: without it), and put its number and its error, or
    "right", into `said`."""
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=number)
    try:
        if version is not None:
            module: Any = ranks
            module.__version__ = version
            ranks.require_everywhere("SWITCH", timedelta(seconds=3))
        said.put((number, "right"))
    except ranks.MissingPluginError as error:
        said.put((number, str(error)))
    dist.barrier()  # otherwise the end of one rank could be an error on the other
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        (("1", "1"), ("right", "right")),
        (("1", None), ("not active on rank 1 of 2", "right")),
        (("1", "2"), ("rank 1 has 2 on", "rank 0 has 1 on")),
    ],
    ids=["both", "one lacks it", "two versions"],
)
def test_all_ranks_or_none(versions: tuple[str | None, str | None], expected: tuple[str, str]) -> None:
    port = free_port()
    context = multiprocessing.get_context("fork")
    said = context.Queue()
    processes = [context.Process(target=rank, args=(n, port, versions[n], said)) for n in range(2)]
    for process in processes:
        process.start()
    found = dict(said.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    for number, part in enumerate(expected):
        assert part in found[number]
