"""Define what can be wrong with a tensor or a file of a checkpoint, and word it for the user."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from k26_plugins.common.checkpoint.table import TensorSpec

NUM_PROBLEMS_SHOWN = 8
_LAYER = re.compile(r".*?\b(?:layers|blocks)\.\d+")


class Fault(StrEnum):
    """The kinds of faults in the order in which they are listed.

    Faults of whole files come first, because they explain the others.
    """

    MISSING_FILE = "missing file"
    UNFINISHED = "unfinished download"
    UNREADABLE = "unreadable"
    WRONG_CONTENT = "wrong content"
    NOT_ITS_END = "wrong end"
    TRUNCATED = "truncated"
    MISSING = "missing"
    EXTRA = "extra"
    REPEATED = "repeated"
    WRONG_SHAPE = "wrong shape"
    WRONG_DTYPE = "wrong dtype"
    CONTRADICTION = "contradiction"


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault: the tensor or file that it concerns, and a message with the remedy."""

    fault: Fault
    name: str
    message: str

    @property
    def order(self) -> tuple[int, str]:
        """The sort key of problems: by kind, then by name."""
        return list(Fault).index(self.fault), self.name


def compare(
    name: str, shape: Iterable[int], dtype: str, spec: TensorSpec | None, file: str | None = None
) -> Problem | None:
    """Compare a tensor with its entry in the table, and return the problem, or None.

    dtype: safetensors' name of it. spec: None if the table has no such tensor. file: the file that holds the tensor.
    """
    if spec is None:
        return extra(name, file)
    if tuple(shape) != spec.shape:
        message = f"has shape {list(shape)}, expected {list(spec.shape)}: config.json and weights are of two models."
        return Problem(Fault.WRONG_SHAPE, name, message)
    if dtype not in spec.stored_dtypes:
        message = f"has dtype {dtype}, expected {spec.dtype}: use the checkpoint as published, without conversion."
        return Problem(Fault.WRONG_DTYPE, name, message)
    return None


def extra(name: str, file: str | None = None) -> Problem:
    """Return the problem of a tensor that the model does not have. file: the file that holds it, if known."""
    if file is None:
        return Problem(Fault.EXTRA, name, "is not part of this model: remove the file that it came with.")
    return Problem(Fault.EXTRA, name, f"in {file} is not part of this model: remove that file, or download it again.")


def missing(spec: TensorSpec) -> Problem:
    """Return the problem of a tensor of the table that no file holds."""
    message = f"should be {spec.dtype} {list(spec.shape)}: download the checkpoint again."
    return Problem(Fault.MISSING, spec.name, message)


def folded(problems: Sequence[Problem]) -> list[str]:
    """Return the problems as lines of text.

    Problems of the same kind in the same layer share a line; each other problem has its own.
    """
    groups: dict[tuple[Fault, str, str], list[Problem]] = {}
    for problem in sorted(problems, key=lambda item: item.order):
        layer = _LAYER.match(problem.name)
        # The message of an extra tensor does not depend on its shape, so another message means another cause.
        cause = problem.message if problem.fault is Fault.EXTRA else ""
        groups.setdefault((problem.fault, layer[0] if layer else problem.name, cause), []).append(problem)
    lines = []
    for (fault, place, _), group in groups.items():
        first = group[0]
        one = f"{first.name} {first.message}"
        lines.append(
            f"{fault}: {one}" if len(group) == 1 else f"{fault}: {len(group):,} tensors of {place}, such as {one}"
        )
    return lines


def listed(problems: Sequence[Problem]) -> str:
    """Return the first lines of `folded` as one text, with the number of further lines."""
    lines = folded(problems)
    shown = "\n".join(f"  {line}" for line in lines[:NUM_PROBLEMS_SHOWN])
    more = f"\n  and {len(lines) - NUM_PROBLEMS_SHOWN} more" if len(lines) > NUM_PROBLEMS_SHOWN else ""
    return shown + more
