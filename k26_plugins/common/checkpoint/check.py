"""Check a checkpoint's headers and file sizes against the tensor table, without reading any weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from k26_plugins.common.checkpoint.classify import Examination, examine_all
from k26_plugins.common.checkpoint.fault import Problem, compare, missing
from k26_plugins.common.checkpoint.header import weight_files
from k26_plugins.common.checkpoint.table import tensor_table
from k26_plugins.common.host.collector import paused
from k26_plugins.common.model.config import read_config_json


@dataclass(slots=True)
class Report:
    """The result of `check`."""

    num_files: int = 0
    num_tensors: int = 0
    num_bytes: int = 0
    """Bytes of the tensors that are complete and correct."""
    problems: list[Problem] = field(default_factory=list)
    """The faults: those of files first, then those of tensors."""
    other_layout: list[str] = field(default_factory=list)
    """The departures from the published layout, empty if there are none.

    An engine's own code may serve such a checkpoint.
    """


def check(folder: str | Path, on_file: Callable[[int, int], None] = lambda done, total: None) -> Report:
    """Examine the checkpoint in `folder`, and report its tensors, faults and departures from the published layout.

    `on_file(done, total)` is called after each file. Raises ConfigError or CheckpointError if there is nothing to
    examine: no readable config.json, or no weight files.

    Examples:
        `tiny_folder` is a checkpoint's folder, here one that `make_tiny` wrote.

        >>> report = check(tiny_folder)
        >>> report.num_files, report.problems, report.other_layout
        (3, [], [])
        >>> from k26_plugins.common.model.config import K26Config
        >>> report.num_tensors == len(tensor_table(K26Config.from_path(tiny_folder)))
        True
    """
    folder = Path(folder)
    with paused():
        return _report(folder, examine_all(read_config_json(folder), folder, on_file))


def _report(folder: Path, examined: Examination) -> Report:
    inventory = examined.inventory
    if inventory is None:
        if not examined.other:
            weight_files(folder)  # raises CheckpointError: the folder has no weight files
        return Report(other_layout=examined.other)
    report = Report(num_files=len(inventory.files), problems=examined.problems, other_layout=examined.other)
    if report.other_layout or not report.problems:
        report.num_tensors = len(inventory.entries)
        report.num_bytes = sum(entry.end - entry.start for entry in inventory.entries.values())
        return report
    table = examined.table or tensor_table(examined.sizes)
    report.problems = list(inventory.damage)
    broken = {problem.name for problem in inventory.damage}
    for entry in inventory.entries.values():
        holder = inventory.holders[entry.name]
        problem = compare(entry.name, entry.shape, entry.dtype, table.get(entry.name), holder)
        if problem:
            report.problems.append(problem)
        elif entry.name not in broken:
            report.num_tensors += 1
            report.num_bytes += entry.end - entry.start
    # The tensors of a file that is missing or has no readable header are not listed: the fault of the file suffices.
    report.problems += [
        missing(table[name])
        for name in table.keys() - inventory.entries.keys()
        if inventory.index.get(name) not in inventory.lost_files
    ]
    report.problems.sort(key=lambda problem: problem.order)
    return report
