"""What vLLM's servers hand on to each other through files: KV caches of prompts, and what the encoder made of images.

vLLM's own connectors for trying this out. Those for deployments need GPUs or packages that the environments have not.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path


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
    """Each has what the other had."""
    aside = one.with_name("aside")
    shutil.move(one, aside)
    shutil.move(other, one)
    shutil.move(aside, other)
