"""What a measurement runs on, and against."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

import torch

from k26_plugins.common.experts.peer import Peer
from k26_plugins.common.experts.triton import unusable_on
from k26_plugins.operate.doctor.engines import is_installed


def gpu() -> torch.device:
    """This machine's first. Raises ValueError where there is none that the kernels are made for."""
    if not torch.cuda.is_available():
        raise ValueError("`k26 tune` needs the GPU that it measures, and torch finds none.")
    device = torch.device("cuda", torch.cuda.current_device())
    reason = unusable_on(device)
    if reason is not None:
        raise ValueError(reason)
    return device


def vllm_peers() -> Mapping[str, Peer]:
    """The kernels that an engine has. Raises ValueError without one: then there is nothing to compare with."""
    if not is_installed("vllm"):
        raise ValueError("`k26 tune` compares with vLLM's kernels (with SGLang's not yet): vLLM is not installed here.")
    # By name: operation imports no engine, and what the module imports is there only where vLLM is.
    peers: Mapping[str, Peer] = import_module("k26_plugins.peers.vllm").PEERS
    return peers
