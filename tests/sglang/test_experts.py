"""Tests of experts that SGLang's own code moves between ranks."""

from __future__ import annotations

import pytest
from support.eplb import assert_moved_experts_compute_as_before


@pytest.mark.long
def test_experts_that_sglang_moves_compute_as_before() -> None:
    """SGLang's EPLB algorithm and transfer run on two ranks, and a decode and a prefill are computed as before. There
    is no server, because a server's EPLB waits for a GPU."""
    assert_moved_experts_compute_as_before("sglang")
