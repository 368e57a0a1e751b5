"""Define a finding, which every examination of the doctor returns."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How good or bad a finding is."""

    OK = "ok"
    NOTE = "note"
    """For a finding that is neither good nor bad, or that is about something the user did not ask for."""
    BAD = "BAD"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that the doctor found."""

    level: Level
    what: str
    """The subject, such as `GPU 0 link`."""
    detail: str
    remedy: str = ""
    """What the user can do about it, in words; empty if nothing need be done."""
    fix: str = ""
    """A shell command that mends the fault; empty if no command does."""
