"""Hold a checkpoint's headers and file sizes against the tensor table, without reading a weight."""

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
    """What `check` found."""

    num_files: int = 0
    num_tensors: int = 0
    num_bytes: int = 0
    """Bytes of the tensors that are in place and right."""
    problems: list[Problem] = field(default_factory=list)
    """What is wrong with files first, then tensors."""
    other_layout: list[str] = field(default_factory=list)
    """What is not as published; empty for the published layout. An engine's own code serves such a checkpoint."""


def check(folder: str | Path, on_file: Callable[[int, int], None] = lambda done, total: None) -> Report:
    """Examine the checkpoint in `folder`: against the table of its configuration where that is of the published layout.

    `on_file(done, total)` is called after each file. Raises ConfigError or CheckpointError where there is nothing to
    examine: no readable config.json, no weight files.
    """
    folder = Path(folder)
    with paused():
        return _report(folder, examine_all(read_config_json(folder), folder, on_file))


def _report(folder: Path, examined: Examination) -> Report:
    inventory = examined.inventory
    if inventory is None:
        if not examined.other:
            weight_files(folder)  # which says that there is none
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
    # Tensors of a file that is not there, or has no header, are not listed one by one: the file's name says it all.
    report.problems += [
        missing(table[name])
        for name in table.keys() - inventory.entries.keys()
        if inventory.index.get(name) not in inventory.lost_files
    ]
    report.problems.sort(key=lambda problem: problem.order)
    return report
