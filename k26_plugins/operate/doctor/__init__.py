"""What is installed, what is active, what would run, and whether it is right: `examine` gathers it all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from k26_plugins.operate.doctor.bandwidth import bandwidth_findings
from k26_plugins.operate.doctor.checkpoint import checkpoint_findings
from k26_plugins.operate.doctor.engines import ENGINES, engine_findings
from k26_plugins.operate.doctor.experts import experts_findings
from k26_plugins.operate.doctor.finding import Finding, Level
from k26_plugins.operate.doctor.machine import machine_findings, version_findings
from k26_plugins.operate.doctor.pieces import piece_findings

__all__ = ["ENGINES", "Finding", "Level", "examine"]


def examine(
    checkpoint: Path | None,
    engine: str | None,
    on_stage: Callable[[str], None] = lambda stage: None,
    *,
    measure: bool = True,
) -> list[Finding]:
    """Everything about this environment. engine: one that must be there; by default any that is found is looked at.

    measure: how fast weights move, too.
    """
    findings: list[Finding] = []
    for stage, examined in (
        ("versions", version_findings),
        ("machine", machine_findings),
        ("bandwidth", lambda: bandwidth_findings(checkpoint) if measure else []),
        ("engines", lambda: engine_findings(engine)),
        ("settings", piece_findings),
        ("experts", lambda: experts_findings(checkpoint)),
    ):
        on_stage(stage)
        findings += examined()
    if checkpoint is not None:
        on_stage("checkpoint")
        findings += checkpoint_findings(checkpoint)
    return findings
