"""Hold a checkpoint's headers and file sizes against the tensor table, without reading a weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from k26_plugins.common.checkpoint.fault import Problem, compare, missing
from k26_plugins.common.checkpoint.inventory import take_inventory
from k26_plugins.common.checkpoint.table import tensor_table
from k26_plugins.common.config import K26Config


@dataclass(slots=True)
class Report:
    """What `check` found."""

    num_files: int = 0
    num_tensors: int = 0
    num_bytes: int = 0
    """Bytes of the tensors that are in place and right."""
    problems: list[Problem] = field(default_factory=list)


def check(folder: str | Path, on_file: Callable[[int, int], None] = lambda done, total: None) -> Report:
    """Compare the checkpoint in `folder` with the table of its own configuration, as the published layout has it.

    `on_file(done, total)` is called after each file. Raises ConfigError or CheckpointError where there is nothing to
    compare: no readable config.json, no weight files. `classify` says first whether the layout is the published one.
    """
    folder = Path(folder)
    table = tensor_table(K26Config.from_path(folder))
    inventory = take_inventory(folder, on_file)
    report = Report(num_files=len(inventory.files), problems=list(inventory.damage))
    broken = {problem.name for problem in inventory.damage}
    for entry in inventory.entries.values():
        problem = compare(entry.name, entry.shape, entry.dtype, table.get(entry.name))
        if problem:
            report.problems.append(problem)
        elif entry.name not in broken:
            report.num_tensors += 1
            report.num_bytes += entry.end - entry.start
    report.problems += [missing(table[name]) for name in table.keys() - inventory.entries.keys()]
    report.problems.sort(key=lambda problem: (problem.fault, problem.name))
    return report
