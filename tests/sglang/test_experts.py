"""Experts that SGLang's own code moves between ranks."""

from __future__ import annotations

import pytest
from support.eplb import assert_moved_experts_compute_as_before


@pytest.mark.long
def test_experts_that_sglang_moves_compute_as_before() -> None:
    """EPLB's own algorithm and transfer on two ranks, for a decode and a prefill: a server waits for a GPU then."""
    assert_moved_experts_compute_as_before("sglang")
