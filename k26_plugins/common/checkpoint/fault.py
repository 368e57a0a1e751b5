"""What can be wrong with a tensor or a file of a checkpoint, and how it is said."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from k26_plugins.common.checkpoint.table import TensorSpec

NUM_PROBLEMS_SHOWN = 8


class Fault(StrEnum):
    MISSING = "missing"
    EXTRA = "extra"
    REPEATED = "repeated"
    WRONG_SHAPE = "wrong shape"
    WRONG_DTYPE = "wrong dtype"
    TRUNCATED = "truncated"
    UNREADABLE = "unreadable"
    CONTRADICTION = "contradiction"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, with the tensor or file it concerns and the remedy in `message`."""

    fault: Fault
    name: str
    message: str


def compare(name: str, shape: Iterable[int], dtype: str, spec: TensorSpec | None) -> Problem | None:
    """The fault of a tensor against its line in the table, or None. `dtype` is safetensors' name."""
    if spec is None:
        return extra(name)
    if tuple(shape) != spec.shape:
        message = f"has shape {list(shape)}, expected {list(spec.shape)}: config.json and weights are of two models."
        return Problem(Fault.WRONG_SHAPE, name, message)
    if dtype not in spec.stored_dtypes:
        message = f"has dtype {dtype}, expected {spec.dtype}: use the checkpoint as published, without conversion."
        return Problem(Fault.WRONG_DTYPE, name, message)
    return None


def extra(name: str) -> Problem:
    return Problem(Fault.EXTRA, name, "is not part of this model: remove the file that it came with.")


def missing(spec: TensorSpec) -> Problem:
    message = f"should be {spec.dtype} {list(spec.shape)}: download the checkpoint again."
    return Problem(Fault.MISSING, spec.name, message)


def listed(problems: Sequence[Problem]) -> str:
    """The first of the problems, a line each, and how many more there are."""
    shown = "\n".join(f"  {item.fault}: {item.name} {item.message}" for item in problems[:NUM_PROBLEMS_SHOWN])
    more = f"\n  and {len(problems) - NUM_PROBLEMS_SHOWN} more" if len(problems) > NUM_PROBLEMS_SHOWN else ""
    return shown + more
