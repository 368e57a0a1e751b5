"""Sends new weights to a serving vLLM, as a trainer does: from the disk at once, or in buckets.

vLLM's own transports of buckets, NCCL and CUDA's IPC, need GPUs. Here the tests' own transport reads the buckets from
files; what the worker does with the weights is the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from safetensors import safe_open
from support.buckets import buckets
from support.server import Server
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

BACKEND = "files"
ARGUMENTS = [
    *("--worker-extension-cls", "support.vllm_updates.Worker"),
    *("--weight-transfer-config", json.dumps({"backend": BACKEND})),
]


@dataclass
class _Bucket(WeightTransferUpdateInfo):
    file: str
    names: list[str]


class FromFiles(WeightTransferEngine[WeightTransferInitInfo, _Bucket]):
    """A transport of weights for the tests: a bucket names tensors of a file, which the worker reads."""

    init_info_cls = WeightTransferInitInfo
    update_info_cls = _Bucket

    def init_transfer_engine(self, init_info: WeightTransferInitInfo) -> None:
        """Do nothing, since there is nothing to connect to."""

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # vLLM's own method would then wait for an accelerator.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: _Bucket) -> None:
        with safe_open(update_info.file, "pt") as file:
            self.model.load_weights([(name, file.get_tensor(name)) for name in update_info.names])

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Do nothing, since there is nothing to disconnect from."""


class Worker:
    """An empty extension, which makes vLLM import this module, and thereby register the transport, in each worker."""


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, FromFiles)


def from_disk(server: Server, folder: Path) -> None:
    _ask(server, "collective_rpc", method="reload_weights", kwargs={"weights_path": str(folder)}, timeout=300)
    _forget(server)


def in_buckets(server: Server, folder: Path) -> None:
    """Send new weights in buckets to a server whose weights are all zero.

    A trainer sends them so to a server that was started with the meaningless weights of `--load-format dummy`.
    """
    _ask(server, "weight_checker", action="reset")
    _ask(server, "init_weight_transfer_engine", init_info={})
    _ask(server, "start_weight_update")
    for path, names in buckets(folder):
        _ask(server, "update_weights", update_info={"file": str(path), "names": names})
    _ask(server, "finish_weight_update")
    _forget(server)


def _ask(server: Server, path: str, **body: Any) -> None:
    answer = httpx.post(f"{server.url}/{path}", json=body, timeout=300)
    assert answer.status_code == 200, answer.text


def _forget(server: Server) -> None:
    """Reset the caches of images and of the encoder's output.

    The workers drop what they computed with the old weights, and vLLM leaves it to the caller to tell the scheduler.
    """
    for cache in ("mm", "encoder"):
        _ask(server, f"reset_{cache}_cache")


WAYS = (from_disk, in_buckets)
