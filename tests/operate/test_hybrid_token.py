"""Tests of the predicted times of a hybrid run's token: docs/hybrid.md has the program's tables, and the CPU's part is
checked by hand."""

from __future__ import annotations

import pytest
from bench.hybrid_token import MACHINES, predict, table
from support.documented import ROOT

from k26_plugins.common.model.config import K26Config


def test_the_document_has_the_predicted_tables() -> None:
    assert "\n".join(table(K26Config())) in (ROOT / "docs/hybrid.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.gpus)
def test_the_cpu_s_part_is_the_bytes_of_eight_experts_in_sixty_layers(machine: object) -> None:
    found = predict(machine, K26Config())  # type: ignore[arg-type]
    # By the specification: 7168 by 2048, three projections, four bits and a bfloat16 scale for 32 weights.
    expert = 3 * 7168 * 2048 * (0.5 + 2 / 32)
    read = 60 * 8 * expert * (384 - found.plan.gpu_experts) / 384
    assert found.cpu_bytes == pytest.approx(read)
    assert found.graph.cpu == found.waiting.cpu == pytest.approx(read / found.machine.channels / 0.8 / 0.85)
    assert found.graph.total >= found.graph.cpu + found.graph.waits
    assert found.graph.total <= found.waiting.total
