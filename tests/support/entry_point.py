"""A plugin of the tests' own, found as an engine finds plugins: by the metadata of a distribution on the path."""

from __future__ import annotations

from pathlib import Path


def write_entry_point(folder: Path, name: str, group: str, target: str) -> None:
    """folder: one without such metadata, to be put on the path. target: `module:function`."""
    info = folder / f"{name}-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {target}\n")
