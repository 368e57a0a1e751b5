"""Checks that every rank runs this plugin: a rank without it would compute the same model by the engine's own code.

A collective operation would wait for ever on a rank that takes no part. So each rank writes its plugin's version into
the store through which torch.distributed's ranks found each other, on one host or on several, and looks there for the
versions of the others.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d

from k26_plugins import __version__

PATIENCE = timedelta(seconds=60)
"""How long a rank waits for the others. Ranks build the model right after they met, so they are only seconds apart."""
_calls = 0


class MissingPluginError(RuntimeError):
    """A rank runs without the plugin, or with another version of it. The message names the rank and the remedy."""


def require_everywhere(switch: str, patience: timedelta = PATIENCE) -> None:
    """Raise MissingPluginError unless every rank runs this version of the plugin.

    Every rank calls this function where it builds the model. switch: the environment variable that turns the plugin off
    in this engine, for the message. patience: how long to wait for the other ranks.
    """
    global _calls
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    # A draft model, or a second engine in this process, comes here again: each call needs keys of its own in the store.
    _calls += 1
    store = distributed_c10d.PrefixStore(f"k26-plugins/{_calls}", distributed_c10d._get_default_store())
    world = range(dist.get_world_size())
    store.set(str(dist.get_rank()), f"{__version__} on {socket.gethostname()}, process {os.getpid()}")
    try:
        store.wait([str(rank) for rank in world], patience)
    except RuntimeError:
        missing = [rank for rank in world if not store.check([str(rank)])]
        listed = ", ".join(str(rank) for rank in missing)
        raise MissingPluginError(
            f"k26-plugins is not active on rank {listed} of {len(world)}: those ranks would compute Kimi-K2.6 by the "
            f"engine's own code, this one by the plugin's. Install k26-plugins {__version__} there and let {switch} name "
            f"it, or switch it off everywhere."
        ) from None
    found = {rank: store.get(str(rank)).decode() for rank in world}
    others = [f"rank {rank} has {text}" for rank, text in found.items() if text.split(" ")[0] != __version__]
    if others:
        raise MissingPluginError(
            f"ranks run different versions of k26-plugins: rank {dist.get_rank()} has {__version__}, {'; '.join(others)}. "
            f"Install the same everywhere."
        )
