"""What vLLM's servers hand on to each other: KV caches of prompts, and what the encoder made of images.

Through files by vLLM's own connectors for trying this out, and from memory to memory by NIXL, as deployments do.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

# Flags of servers that hand KV caches on to each other by NIXL.
NIXL = [
    "--kv-transfer-config",
    json.dumps({"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}),
]
TO_HAND_ON: dict[str, Any] = {"do_remote_decode": True, "do_remote_prefill": False}
"""What a request says whose prompt another server is to answer. The answer says where its KV cache is."""


def lmcache(port: int, http_port: int) -> list[str]:
    """Flags of a server that keeps its prompts' KV caches in LMCache's own server, which it starts."""
    # The mode in which vLLM's connector copies a CPU's cache; LMCache's server has it only when it is asked for.
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
    """Flags of a server that is `kv_producer` or `kv_consumer`, or `kv_both`."""
    return ["--kv-transfer-config", _config("kv", "ExampleConnector", folder, role)]


def encoded(folder: Path, role: str) -> list[str]:
    """Flags of a server that is `ec_producer`, which only encodes, or `ec_consumer`."""
    return ["--ec-transfer-config", _config("ec", "ECExampleConnector", folder, role)]


def _config(kind: str, connector: str, folder: Path, role: str) -> str:
    extra = {"shared_storage_path": str(folder)}
    return json.dumps({f"{kind}_connector": connector, f"{kind}_role": role, f"{kind}_connector_extra_config": extra})


def items(folder: Path) -> list[Path]:
    """A folder for each prompt or image, in the order in which they were handed on."""
    return sorted(folder.iterdir(), key=lambda item: item.stat().st_ctime_ns)


def exchange(one: Path, other: Path) -> None:
    """Exchange two items, so that each folder has what the other had."""
    aside = one.with_name("aside")
    shutil.move(one, aside)
    shutil.move(other, one)
    shutil.move(aside, other)
