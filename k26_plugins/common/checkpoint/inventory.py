"""What the weight files of a folder say that they hold, and which of them are damaged: headers and sizes, no weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from k26_plugins.common.checkpoint.fault import Fault, Problem
from k26_plugins.common.checkpoint.header import CheckpointError, HeaderEntry, read_header, weight_files

_NUMBERED = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")


@dataclass(slots=True)
class Inventory:
    files: list[Path]
    entries: dict[str, HeaderEntry] = field(default_factory=dict)
    damage: list[Problem] = field(default_factory=list)
    """Files that are missing or unreadable, tensors that are cut off or there twice."""


def take_inventory(folder: Path, on_file: Callable[[int, int], None] = lambda done, total: None) -> Inventory:
    """Read the headers. `on_file(done, total)` is called after each file.

    Raises CheckpointError where there is no weight file or the index is damaged.
    """
    files = weight_files(folder)
    inventory = Inventory(files, damage=_missing_files(files))
    holders: dict[str, str] = {}
    with ThreadPoolExecutor(max_workers=8) as pool:
        for done, (file, (entries, problems)) in enumerate(zip(files, pool.map(_read_file, files), strict=True), 1):
            inventory.damage.extend(problems)
            for entry in entries:
                if entry.name in holders:
                    message = (
                        f"is in {holders[entry.name]} and in {file.name}: delete the file that is not of this model."
                    )
                    inventory.damage.append(Problem(Fault.REPEATED, entry.name, message))
                else:
                    holders[entry.name] = file.name
                    inventory.entries[entry.name] = entry
            on_file(done, len(files))
    return inventory


def _missing_files(files: list[Path]) -> list[Problem]:
    """Files that the names of the others speak of. An index names its files, and `_read_file` finds those missing."""
    found: dict[tuple[str, str, int], set[int]] = {}
    for file in files:
        if match := _NUMBERED.fullmatch(file.name):
            found.setdefault((match[1], match[3], len(match[2])), set()).add(int(match[2]))
    return [
        Problem(Fault.MISSING, f"{name}-{number:0{width}}-of-{total}.safetensors", "is not in the folder: download it.")
        for (name, total, width), numbers in found.items()
        for number in range(1, int(total) + 1)
        if number not in numbers
    ]


def _read_file(file: Path) -> tuple[list[HeaderEntry], list[Problem]]:
    try:
        entries = read_header(file)
        size = file.stat().st_size
    except CheckpointError as error:
        return [], [Problem(Fault.UNREADABLE, file.name, str(error))]
    problems = [
        Problem(
            Fault.TRUNCATED,
            entry.name,
            f"ends at byte {entry.end} of {file.name}, which has {size}: download it again.",
        )
        for entry in entries
        if entry.end > size
    ]
    return entries, problems
