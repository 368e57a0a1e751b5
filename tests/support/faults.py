"""Holds what the tests that seed faults into a served model share, be the model an engine's or the reference."""

from __future__ import annotations

from collections.abc import Sequence

from k26_plugins.common.prompt.special_tokens import special_token_ids

FAULTY_LAYER, FAULTY_EXPERT = 2, 5
SPECIAL = special_token_ids(256)

LOCATED = {
    "one expert's scale doubled": f"routed expert {FAULTY_EXPERT} of layer {FAULTY_LAYER}",
    "gate and up swapped": "gate and up projection of the routed experts",
    "router bias dropped": "without e_score_correction_bias",
    "YaRN's factor halved": "YaRN's factor is half",
    "padding after normalizing": "images are padded after they are normalized",
    "tensor-parallel shards swapped": "halves of the routed experts' down projection",
    "token ids shifted by 3": "special tokens are shifted by -3",
    "think block missing": "the <think> that opens the answer is missing",
}
"""The words by which `k26 verify` must name the cause, by fault."""


def shift_by_three(token_ids: Sequence[int]) -> list[int]:
    """Shift special tokens' ids by 3, as transformers 5.4 does under an engine that mended only the media token's."""
    kept = SPECIAL["<|media_pad|>"]
    return [token - 3 if token > SPECIAL["<|im_assistant|>"] and token != kept else token for token in token_ids]


def causes(output: str) -> str:
    """Return the lines of `k26 verify`'s output that say what is probably wrong, and why."""
    return " ".join(line for line in output.splitlines() if "probably" in line or "because" in line)
