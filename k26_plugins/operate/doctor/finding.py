"""One thing that the doctor found."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    OK = "ok"
    NOTE = "note"
    """Neither good nor bad, or not what was asked for."""
    BAD = "BAD"


@dataclass(frozen=True, slots=True)
class Finding:
    level: Level
    what: str
    detail: str
    remedy: str = ""
    fix: str = ""
    """A shell command that mends it, where one does."""
