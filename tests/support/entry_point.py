"""A plugin of the tests' own, found as an engine finds plugins: by the metadata of a distribution on the path."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

from support.server import python_path


def write_entry_point(folder: Path, name: str, group: str, target: str) -> None:
    """folder: one without such metadata, to be put on the path. target: `module:function`."""
    info = folder / f"{name}-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {target}\n")


def of_sglang(module: ModuleType, folder: Path) -> dict[str, str]:
    """What to set for a server of SGLang that calls the `register` of a module of `support` in each of its processes.

    folder: an empty one, for the plugin's metadata.
    """
    name = module.__name__.removeprefix("support.sglang_")
    write_entry_point(folder, f"k26_{name}", "sglang.srt.plugins", f"{module.__name__}:register")
    return {"PYTHONPATH": os.pathsep.join([str(folder), python_path()])}
