"""Examine an environment for `k26 doctor`: what is installed, whether the plugins are active, and what they compute.

Each module of this package examines one subject and returns findings; `examine` runs them in turn.
"""

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
    """Return the findings about this environment and, if `checkpoint` names a folder, about that checkpoint.

    engine: an engine that must be installed, one of ENGINES; every installed engine is examined in any case. on_stage:
    called with the name of each stage before the stage begins. measure: whether to measure how fast weights move, too.
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
