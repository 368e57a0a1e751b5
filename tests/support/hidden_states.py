"""Checks the hidden states that an Eagle3 draft model reads from the target model, against those of the reference.

The draft reads the input of some layers.
"""

from __future__ import annotations

from pathlib import Path

import torch

from k26_plugins.common.reference.decoder import KVCache
from k26_plugins.common.reference.kimi_k26 import KimiK26
from k26_plugins.common.tiny.checkpoint import TinySizes, make_tiny
from k26_plugins.common.tiny.draft import make_eagle3

# The largest median, over the tokens, of the relative error of a hidden state in bfloat16. A rounding near a tie of two
# experts' scores changes some tokens by far more.
TOLERANCE = 0.02


LAYERS_READ = (2, 3, 4)
"""The layers whose inputs the draft of `make_with_draft` reads."""


def make_with_draft(folder: Path) -> tuple[Path, Path]:
    """Write a checkpoint of as many layers as a draft needs, and a draft for it; return the two folders."""
    make_tiny(folder / "tiny", TinySizes(layers=5))
    assert make_eagle3(folder / "tiny", folder / "draft") == LAYERS_READ
    return folder / "tiny", folder / "draft"


@torch.inference_mode()
def in_front_of_layers(reference: KimiK26, token_ids: list[int]) -> torch.Tensor:
    """Return the input of each of the reference's layers, `[layers, T, hidden_size]`."""
    x = reference.embed(torch.tensor(token_ids))
    cache = KVCache(reference.config.text, len(token_ids), reference.text.dtype)
    found = []
    for block in reference.text.layers:
        found.append(x)
        x = block.forward(x, cache, absorbed=False)
    return torch.stack(found)


def assert_read_in_front_of(
    layers: tuple[int, ...], read: torch.Tensor, reference: KimiK26, token_ids: list[int]
) -> None:
    """Assert that a draft read the inputs of `layers`, and of no other layers.

    read: the hidden states that the draft read for the prompt `token_ids`, `[T, len(layers) · hidden_size]`.
    """
    expected = in_front_of_layers(reference, token_ids)
    for layer, part in zip(layers, read.float().chunk(len(layers), dim=-1), strict=True):
        errors = (part - expected).norm(dim=-1) / expected.norm(dim=-1)
        middle = errors.median(dim=-1).values
        print(f"read in front of layer {layer}: median error by layer {[f'{one:.4f}' for one in middle.tolist()]}")
        assert middle.argmin().item() == layer
        assert middle[layer] <= TOLERANCE
