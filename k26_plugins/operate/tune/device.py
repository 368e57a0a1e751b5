"""Choose the GPU that a measurement runs on, and the engine whose kernels the core's are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

import torch

from k26_plugins.common.experts.peer import Peer
from k26_plugins.common.experts.triton import unusable_on
from k26_plugins.common.experts.tuned import ENGINES
from k26_plugins.operate.doctor.engines import is_installed


def gpu() -> torch.device:
    """Return torch's current GPU. Raises ValueError if there is no GPU, or the kernels are not made for it."""
    if not torch.cuda.is_available():
        raise ValueError("`k26 tune` needs the GPU that it measures, and torch finds none.")
    device = torch.device("cuda", torch.cuda.current_device())
    reason = unusable_on(device)
    if reason is not None:
        raise ValueError(reason)
    return device


def engine_to_measure(engine: str | None) -> str:
    """Return `vllm` or `sglang`: the engine that is asked for, or else the only one that is installed here.

    Raises ValueError if the engine that is asked for is not installed. Without one asked for, raises ValueError if no
    engine is installed, or several are.
    """
    installed = [name for name in ENGINES if is_installed(name)]
    if engine is not None:
        if engine not in installed:
            raise ValueError(f"`k26 tune` compares with the kernels of {engine}, which is not installed here.")
        return engine
    if not installed:
        raise ValueError("`k26 tune` compares with an engine's kernels: neither vLLM nor SGLang is installed here.")
    if len(installed) > 1:
        raise ValueError(f"{' and '.join(installed)} are installed here: say with --engine which one serves.")
    return installed[0]


def peers_of(engine: str) -> Mapping[str, Peer]:
    """Return an engine's kernels for the experts, by name. engine: `vllm` or `sglang`."""
    # The module is imported by its name because `operate` imports no engine, and this module's functions do.
    peers: Mapping[str, Peer] = import_module(f"k26_plugins.{engine}.peers").PEERS
    return peers
