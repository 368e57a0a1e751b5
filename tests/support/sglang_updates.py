"""Sends new weights to a serving SGLang in each way that a trainer has: from the disk, as tensors, through a group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from sglang.srt.utils import MultiprocessingSerializer, init_custom_process_group
from support.buckets import buckets
from support.server import Server, free_port

GROUP = "trainer"


def from_disk(server: Server, folder: Path) -> None:
    # Without a load format SGLang would use that of its start, which may be `dummy`.
    _ask(server, "update_weights_from_disk", model_path=str(folder), load_format="auto")


def from_tensors(server: Server, folder: Path) -> None:
    """Hand weights over in shared memory, as a trainer on the same machine does.

    The weights that they replace are drawn at random first, as `--load-format dummy` draws them.
    """
    _ask(server, "weights_checker", action="reset_tensors")
    strategy = torch.multiprocessing.get_sharing_strategy()
    # With the default strategy, by file descriptor, only a process's own children may open the memory.
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        with _session(server):
            for bucket in _buckets(folder):
                payload = MultiprocessingSerializer.serialize(bucket, output_str=True)
                _ask(server, "update_weights_from_tensor", serialized_named_tensors=[payload])
    finally:
        torch.multiprocessing.set_sharing_strategy(strategy)


def from_a_group(server: Server, folder: Path) -> None:
    """Broadcast weights as rank 0 of a process group that the server joins."""
    port = free_port()
    place = {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1, "world_size": 2, "backend": "gloo"}
    with _meanwhile(partial(_ask, server, "init_weights_update_group", group_name=GROUP, **place)):
        group = init_custom_process_group(
            backend="gloo", init_method=f"tcp://127.0.0.1:{port}", world_size=2, rank=0, group_name=GROUP
        )
    try:
        with _session(server):
            for bucket in _buckets(folder):
                with _meanwhile(partial(_ask, server, "update_weights_from_distributed", **_described(bucket))):
                    for _, tensor in bucket:
                        torch.distributed.broadcast(tensor, src=0, group=group)
    finally:
        torch.distributed.destroy_process_group(group)
        _ask(server, "destroy_weights_update_group", group_name=GROUP)


def _ask(server: Server, path: str, **body: Any) -> None:
    response = server.post(f"/{path}", **body)
    assert response.status_code == 200, response.text
    assert response.json()["success"], response.text


@contextmanager
def _session(server: Server) -> Iterator[None]:
    """Frame an update in parts, as SGLang's API requires it."""
    _ask(server, "begin_weight_update")
    yield
    _ask(server, "end_weight_update")


@contextmanager
def _meanwhile(ask: Callable[[], None]) -> Iterator[None]:
    """Keep a request under way within the block, since the server answers it only when this side has done its part."""
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(ask)
        yield
        answer.result()


def _described(bucket: list[tuple[str, torch.Tensor]]) -> dict[str, Any]:
    return {
        "names": [name for name, _ in bucket],
        "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
        "shapes": [list(tensor.shape) for _, tensor in bucket],
        "group_name": GROUP,
    }


def _buckets(folder: Path) -> Iterator[list[tuple[str, torch.Tensor]]]:
    for path, names in buckets(folder):
        with safe_open(path, "pt") as file:
            yield [(name, file.get_tensor(name)) for name in names]


# The tests use these in this order on one server: each replaces the weights that the one before it brought.
WAYS = (from_disk, from_tensors, from_a_group)
