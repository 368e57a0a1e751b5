"""Tests of a small swarm through the real server: conversations are kept, faults are found, metrics are there."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.server import Server
from support.swarm import assert_a_mixed_swarm_is_found, assert_a_swarm_is_held, assert_the_metrics_are_there


def test_a_swarm_is_held_among_adversarial_requests(server: Server, tiny_folder: Path, tmp_path: Path) -> None:
    assert_a_swarm_is_held(server, tiny_folder, tmp_path / "run.json", agents=8, steps=20, adversarial=63)
    assert_the_metrics_are_there(server, ranks=1, layers=2)


# CI runs this check on the scripted server, in tests/operate/test_swarm.py.
@pytest.mark.long
def test_a_mixed_swarm_is_found(server: Server) -> None:
    assert_a_mixed_swarm_is_found(server)
