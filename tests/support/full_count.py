"""A checkpoint of as many tensors as the published one has, 208,550, of tiny sizes."""

from __future__ import annotations

from pathlib import Path

import torch

from k26_plugins.common.checkpoint import Checkpoint
from k26_plugins.common.multimodal import KimiK26
from k26_plugins.common.tiny import TinySizes, make_tiny

SIZES = TinySizes(layers=61, experts=384, top_k=8, vision_layers=27, shards=64)
NUM_TENSORS = 208_550
# Sixty layers of random weights make much of bfloat16's rounding: the reference in it is 0.13 away from itself in float32,
# and the answer after another token 0.7.
MAX_MEAN_KL = 0.3
PROMPT = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(0))


def make(folder: Path) -> torch.Tensor:
    """Make it. Returns the log-probabilities that the reference gives after each token of PROMPT."""
    make_tiny(folder, SIZES)
    checkpoint = Checkpoint(folder)
    assert len(checkpoint.table) == NUM_TENSORS
    return KimiK26(checkpoint, torch.float32).logprobs(PROMPT)


def assert_served(served: torch.Tensor, expected: torch.Tensor) -> None:
    """served: what a server gives after each token but the last."""
    kl = (expected[:-1].exp() * (expected[:-1] - served)).sum(-1)
    assert kl.mean().item() <= MAX_MEAN_KL
