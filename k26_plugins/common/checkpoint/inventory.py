"""List the tensors that a folder's weight files declare, and find damaged files.

Only headers and file sizes are read, no weights.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from k26_plugins.common.checkpoint.fault import Fault, Problem
from k26_plugins.common.checkpoint.header import CheckpointError, HeaderEntry, index_of, read_header, weight_files

UNFINISHED = (".aria2", ".part", ".incomplete", ".crdownload", ".download", ".tmp", ".filepart")
_NUMBERED = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")


@dataclass(slots=True)
class Inventory:
    """The contents of a checkpoint's weight files, by their headers and the index."""

    files: list[Path]
    index: dict[str, str] = field(default_factory=dict)
    """The file name of each tensor, as the index gives it."""
    entries: dict[str, HeaderEntry] = field(default_factory=dict)
    damage: list[Problem] = field(default_factory=list)
    """Files that are missing, unfinished or unreadable, and tensors that are truncated or repeated."""
    holders: dict[str, str] = field(default_factory=dict)
    """The name of the file in which each tensor was found."""
    lost_files: set[str] = field(default_factory=set)
    """Names of the files whose tensors are unknown."""


def take_inventory(
    folder: Path,
    on_file: Callable[[int, int], None] = lambda done, total: None,
    saved_state: list[Path] | None = None,
) -> Inventory:
    """Read the headers of a folder's weight files. `on_file(done, total)` is called after each file.

    saved_state: the files of a state that an engine saved, which are read in place of a checkpoint's; the files of its
    ranks hold tensors of the same names. Raises CheckpointError if there are no weight files or the index is damaged.
    """
    from concurrent.futures import ThreadPoolExecutor  # imports logging, which `k26 plan` does not need

    index = {} if saved_state else index_of(folder)
    named = saved_state or weight_files(folder, index)
    files = [file for file in named if file.is_file()]
    damage = [*_missing_files(index, named), *_unfinished(folder)]
    lost_files = {file.name for file in named} - {file.name for file in files}
    inventory = Inventory(files, index, damage=damage, lost_files=lost_files)
    holders = inventory.holders
    with ThreadPoolExecutor(max_workers=8) as pool:
        for done, (file, (entries, problems)) in enumerate(zip(files, pool.map(_read_file, files), strict=True), 1):
            inventory.damage.extend(problems)
            if any(problem.fault is Fault.UNREADABLE for problem in problems):
                inventory.lost_files.add(file.name)
            holder = file.name
            for entry in entries:
                if entry.name in holders and saved_state:
                    inventory.entries[f"{entry.name} of {holder}"] = entry
                elif entry.name in holders:
                    message = f"is in {holders[entry.name]} and in {holder}: delete the file that is not of this model."
                    inventory.damage.append(Problem(Fault.REPEATED, entry.name, message))
                else:
                    holders[entry.name] = holder
                    inventory.entries[entry.name] = entry
            on_file(done, len(files))
    return inventory


def _missing_files(index: dict[str, str], files: list[Path]) -> list[Problem]:
    """Return a problem for each missing file.

    A file is missing if `files` names it, or if the numbering of the other files (`…-00002-of-00064`) implies it.
    """
    tensors = Counter(index.values())
    found: dict[tuple[str, str, int], set[int]] = {}
    lost = [file.name for file in files if not file.is_file()]
    for file in files:
        if match := _NUMBERED.fullmatch(file.name):
            found.setdefault((match[1], match[3], len(match[2])), set()).add(int(match[2]))
    lost += [
        f"{name}-{number:0{width}}-of-{total}.safetensors"
        for (name, total, width), numbers in found.items()
        for number in range(1, int(total) + 1)
        if number not in numbers
    ]
    return [
        Problem(
            Fault.MISSING_FILE,
            name,
            f"is not in the folder{f', with {tensors[name]:,} tensors' if name in tensors else ''}: download it.",
        )
        for name in lost
    ]


def _unfinished(folder: Path) -> list[Problem]:
    """Return a problem for each partial file or marker that a download program keeps until its file is complete.

    Some programs give a file its full size at once, with holes, so that its size alone proves nothing.
    """
    left = [file for ending in UNFINISHED for file in folder.glob(f"*.safetensors{ending}")]
    # The hub's own client keeps partial files in a folder of their own. Its lock files do not count: they stay after a
    # complete download too.
    left += (folder / ".cache" / "huggingface" / "download").rglob("*.incomplete")
    return [
        Problem(
            Fault.UNFINISHED,
            str(file.relative_to(folder)),
            "is what a download keeps until it is done: finish it, or delete this and its file, and download again.",
        )
        for file in sorted(left)
    ]


def _read_file(file: Path) -> tuple[list[HeaderEntry], list[Problem]]:
    try:
        entries = read_header(file)
        size = file.stat().st_size
    except CheckpointError as error:
        return [], [Problem(Fault.UNREADABLE, file.name, str(error).removeprefix(f"{file.name} "))]
    problems = [
        Problem(
            Fault.TRUNCATED,
            entry.name,
            f"ends at byte {entry.end} of {file.name}, which has {size}: download it again.",
        )
        for entry in entries
        if entry.end > size
    ]
    end = max((entry.end for entry in entries), default=size)
    if size > end:
        message = f"has {size - end:,} bytes behind its last tensor, where a file ends: download it again."
        problems.append(Problem(Fault.NOT_ITS_END, file.name, message))
    return entries, problems
