"""Hold a checkpoint's headers and file sizes against the tensor table, without reading a weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from k26_plugins.common.checkpoint.header import CheckpointError, HeaderEntry, read_header, weight_files
from k26_plugins.common.checkpoint.table import TensorSpec, tensor_table
from k26_plugins.common.config import K26Config

NUM_PROBLEMS_SHOWN = 8


class Fault(StrEnum):
    MISSING = "missing"
    EXTRA = "extra"
    REPEATED = "repeated"
    WRONG_SHAPE = "wrong shape"
    WRONG_DTYPE = "wrong dtype"
    TRUNCATED = "truncated"
    UNREADABLE = "unreadable"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, with the tensor or file it concerns and the remedy in `message`."""

    fault: Fault
    name: str
    message: str


@dataclass(slots=True)
class Report:
    """What `check` found."""

    num_files: int = 0
    num_tensors: int = 0
    num_bytes: int = 0
    """Bytes of the tensors that are in place and right."""
    problems: list[Problem] = field(default_factory=list)


def check(folder: str | Path, on_file: Callable[[int, int], None] = lambda done, total: None) -> Report:
    """Compare the checkpoint in `folder` with the table of its own configuration.

    `on_file(done, total)` is called after each file. Raises ConfigError or CheckpointError where there is nothing to
    compare: no readable config.json, no weight files.
    """
    folder = Path(folder)
    table = tensor_table(K26Config.from_path(folder))
    files = weight_files(folder)
    report = Report(num_files=len(files))
    found: dict[str, str] = {}
    with ThreadPoolExecutor(max_workers=8) as pool:
        for done, (file, (entries, problems)) in enumerate(zip(files, pool.map(_read_file, files), strict=True), 1):
            report.problems.extend(problems)
            broken = {problem.name for problem in problems}
            for entry in entries:
                if entry.name in found:
                    message = (
                        f"is in {found[entry.name]} and in {file.name}: delete the file that is not of this model."
                    )
                    report.problems.append(Problem(Fault.REPEATED, entry.name, message))
                    continue
                found[entry.name] = file.name
                problem = compare(entry.name, entry.shape, entry.dtype, table.get(entry.name))
                if problem:
                    report.problems.append(problem)
                elif entry.name not in broken:
                    report.num_tensors += 1
                    report.num_bytes += table[entry.name].num_bytes
            on_file(done, len(files))
    for name in table.keys() - found.keys():
        message = f"should be {table[name].dtype} {list(table[name].shape)}: download the checkpoint again."
        report.problems.append(Problem(Fault.MISSING, name, message))
    report.problems.sort(key=lambda problem: (problem.fault, problem.name))
    return report


def require_whole(folder: str | Path) -> None:
    """Raise CheckpointError with the first faults of a local checkpoint.

    A folder without weight files passes: it is a name on the hub, or dummy weights. What arrives is checked while it
    is loaded.
    """
    if not any(Path(folder).glob("*.safetensors")):
        return
    problems = check(folder).problems
    if problems:
        shown = "\n".join(f"  {item.fault}: {item.name} {item.message}" for item in problems[:NUM_PROBLEMS_SHOWN])
        more = f"\n  and {len(problems) - NUM_PROBLEMS_SHOWN} more" if len(problems) > NUM_PROBLEMS_SHOWN else ""
        raise CheckpointError(
            f"the checkpoint in {folder} has {len(problems)} faults:\n{shown}{more}\n"
            f"Run `k26 check {folder}` for all of them."
        )


def compare(name: str, shape: Iterable[int], dtype: str, spec: TensorSpec | None) -> Problem | None:
    """The fault of a tensor against its line in the table, or None. `dtype` is safetensors' name."""
    if spec is None:
        return Problem(Fault.EXTRA, name, "is not part of this model: remove the file that it came with.")
    if tuple(shape) != spec.shape:
        message = f"has shape {list(shape)}, expected {list(spec.shape)}: config.json and weights are of two models."
        return Problem(Fault.WRONG_SHAPE, name, message)
    if dtype != spec.dtype:
        message = f"has dtype {dtype}, expected {spec.dtype}: use the checkpoint as published, without conversion."
        return Problem(Fault.WRONG_DTYPE, name, message)
    return None


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
