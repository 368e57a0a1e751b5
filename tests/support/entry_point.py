"""Installs test plugins for an engine's server, which finds them as any plugin, by a distribution's metadata."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

from support.server import python_path


def write_entry_point(folder: Path, name: str, group: str, target: str) -> None:
    """Write the metadata of a distribution that has one entry point into `folder`, which the caller puts on the path.

    folder: must not hold this metadata yet. group: the engine's group of entry points. target: `module:function`.
    """
    info = folder / f"{name}-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {target}\n")


def of_sglang(module: ModuleType, folder: Path) -> dict[str, str]:
    """Return environment variables by which SGLang's server calls `module.register` in each of its processes.

    module: one named `support.sglang_…`. folder: an empty folder for the plugin's metadata.
    """
    name = module.__name__.removeprefix("support.sglang_")
    write_entry_point(folder, f"k26_{name}", "sglang.srt.plugins", f"{module.__name__}:register")
    return {"PYTHONPATH": os.pathsep.join([str(folder), python_path()])}
