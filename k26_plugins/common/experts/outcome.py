"""Read and write the outcome of `k26 tune`: a file of measurements for one GPU, its software, one engine and one shape.

The shape is that of one rank's part of a layer.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from k26_plugins.common.host.cache_folder import outcome_folder
from k26_plugins.common.purpose import Purpose

FORMAT = 1
OURS = "k26"
"""The name of the core's kernels among the kernels that were timed."""


class OutcomeError(ValueError):
    """Raised for a file that is no outcome of `k26 tune`. The message names the file and the remedy."""


@dataclass(frozen=True, slots=True)
class Key:
    """The circumstances for which a measurement holds: if any of them differs, another kernel may be the fastest."""

    gpu: str
    driver: str
    triton: str
    torch: str
    engine: str
    """Name of the engine's package and its version: `vllm 0.32.0`."""
    shape: str
    """Hidden size, intermediate size of a rank, number of experts of a rank: `7168x256x384`."""

    def differences(self, other: Key) -> list[str]:
        """Return in words what the other key has instead, for each field that differs."""
        return [
            f"{field.name} {getattr(other, field.name)} instead of {getattr(self, field.name)}"
            for field in fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]


@dataclass(frozen=True, slots=True)
class Timing:
    """The time and error of one kernel on batches of one size and routing.

    `milliseconds` and `error` are None if the kernel did not run; then `note` says why.
    """

    kernel: str
    routing: str
    tokens: int
    milliseconds: float | None = None
    error: float | None = None
    """‖out − exact‖ / ‖exact‖; infinite if the result is not finite, which the file stores as null."""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The timings of all kernels, the kernel configs of the core's kernels, and the purpose of the server."""

    key: Key
    purpose: Purpose
    tiles: dict[str, Any]
    """The kernel configs with which the core's kernels were timed, as `k26_kernels.use_configs` takes them."""
    timings: tuple[Timing, ...]


def outcome_file(key: Key) -> Path:
    """Return the path of this key's outcome. Each key has a file of its own, so that no two measurements share one."""
    words = (key.gpu, key.engine, key.shape, f"driver {key.driver}", f"torch {key.torch}", f"triton {key.triton}")
    return outcome_folder() / f"{re.sub(r'[^A-Za-z0-9.+]+', '_', '-'.join(words))}.json"


def read_outcome(file: Path) -> Outcome:
    """Read an outcome. Raises OutcomeError if the file cannot be read or holds anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise OutcomeError(
                f"{file} has format {content['format']}, this version reads {FORMAT}: run `k26 tune` again."
            )
        timings = tuple(_timing(**timing) for timing in content["timings"])
        return Outcome(Key(**content["key"]), Purpose(content["purpose"]), dict(content["tiles"]), timings)
    except OutcomeError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutcomeError(
            f"{file} is no outcome of `k26 tune` ({error}): remove it, or run `k26 tune` again."
        ) from error


def _timing(
    kernel: str, routing: str, tokens: int, milliseconds: float | None, error: float | None, note: str
) -> Timing:
    if milliseconds is None:
        return Timing(str(kernel), str(routing), int(tokens), note=str(note))
    time, difference = float(milliseconds), math.inf if error is None else float(error)
    if not 0 < time < math.inf or not difference >= 0:
        raise ValueError(f"{kernel} took {milliseconds} ms with an error of {error}")
    return Timing(str(kernel), str(routing), int(tokens), time, difference, str(note))


def write_outcome(outcome: Outcome, file: Path) -> None:
    """Write an outcome, so that neither a reader nor another writer at the same time meets an incomplete file.

    Raises OSError if the folder cannot be created or written to.
    """
    timings = [asdict(timing) for timing in outcome.timings]
    for timing in timings:
        if timing["error"] == math.inf:
            timing["error"] = None  # JSON has no infinity
    head = {"format": FORMAT, "key": asdict(outcome.key), "purpose": outcome.purpose, "tiles": outcome.tiles}
    lines = ",\n  ".join(json.dumps(timing) for timing in timings)
    content = f'{json.dumps(head, indent=1)[:-2]},\n "timings": [\n  {lines}\n ]\n}}\n'
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=".", suffix=".part")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as opened:
            opened.write(content)
        temporary.chmod(0o644)
        temporary.replace(file)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
