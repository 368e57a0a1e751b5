"""Writes into pytest's summary which instruction sets were run; the tests record each as a property."""

from __future__ import annotations

import pytest

INSTRUCTION_SET = "instruction set"


def summarize(reporter: pytest.TerminalReporter) -> None:
    """Write which instruction sets were run. The skipped tests name the others, with the reason."""
    ran = {
        str(value)
        for report in reporter.getreports("passed")
        for name, value in report.user_properties
        if name == INSTRUCTION_SET
    }
    if ran:
        reporter.write_line(f"instruction sets run: {', '.join(sorted(ran))}")
