"""Gives the flags by which vLLM's servers hand KV caches and the encoder's output for images to each other.

vLLM's own example connectors pass them through files; NIXL passes them from memory to memory, as in deployments.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

# The flags of servers that hand KV caches on to each other by NIXL.
NIXL = [
    "--kv-transfer-config",
    json.dumps({"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}),
]
TO_HAND_ON: dict[str, Any] = {"do_remote_decode": True, "do_remote_prefill": False}
"""The `kv_transfer_params` of a request that another server is to answer. The response says where the KV cache is."""


def lmcache(port: int, http_port: int) -> list[str]:
    """Return the flags of a server that keeps its prompts' KV caches in LMCache's own server, which it starts."""
    # vLLM's connector copies a CPU's cache in this mode only, and LMCache's server offers it only on request.
    options = f"--l1-size-gb 1 --eviction-policy LRU --http-port {http_port} --supported-transfer-mode engine_driven"
    extra = {
        "lmcache.mp.host": "tcp://127.0.0.1",
        "lmcache.mp.port": port,
        "lmcache.mp.autostart": True,
        "lmcache.mp.autostart.server_args": options,
    }
    config = {"kv_connector": "LMCacheMPConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    return ["--kv-transfer-config", json.dumps(config)]


def kv(folder: Path, role: str) -> list[str]:
    """Return the flags of a server that writes or reads KV caches in `folder`.

    role: `kv_producer`, `kv_consumer` or `kv_both`.
    """
    return ["--kv-transfer-config", _config("kv", "ExampleConnector", folder, role)]


def encoded(folder: Path, role: str) -> list[str]:
    """Return the flags of a server that writes or reads the encoder's output in `folder`.

    role: `ec_producer`, a server that only encodes, or `ec_consumer`.
    """
    return ["--ec-transfer-config", _config("ec", "ECExampleConnector", folder, role)]


def _config(kind: str, connector: str, folder: Path, role: str) -> str:
    extra = {"shared_storage_path": str(folder)}
    return json.dumps({f"{kind}_connector": connector, f"{kind}_role": role, f"{kind}_connector_extra_config": extra})


def items(folder: Path) -> list[Path]:
    """Return the folders of the prompts or images that were handed on, in the order in which they were."""
    return sorted(folder.iterdir(), key=lambda item: item.stat().st_ctime_ns)


def exchange(one: Path, other: Path) -> None:
    """Exchange two folders of `items`, so that each has the content of the other."""
    aside = one.with_name("aside")
    shutil.move(one, aside)
    shutil.move(other, one)
    shutil.move(aside, other)
