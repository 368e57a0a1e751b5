"""Whether one routed expert explains where an endpoint is off: the tokens that went to it against all others."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from k26_plugins.operate.golden import Golden
from k26_plugins.operate.verify.measure import Position

# Of a rank test's standard deviations. The published model has 23,040 experts, of which chance takes one to 4.
MIN_SCORE = 6.0
MIN_RATIO = 4.0
MIN_TOKENS = 5


@dataclass(frozen=True, slots=True)
class ExpertFinding:
    layer: int
    expert: int
    tokens: int
    score: float
    ratio: float
    """Median KL of its tokens over the median of all others."""


def expert_scores(golden: Golden, positions: list[Position]) -> torch.Tensor:
    """Of each MoE layer and expert, by how many standard deviations its tokens rank above the others: `[layers, experts]`.

    NaN where too few tokens went there.
    """
    routed = torch.stack([golden.prompts[p.prompt].experts[p.index] for p in positions]).long()
    values = torch.tensor([position.kl for position in positions], dtype=torch.float64)
    ranks = values.argsort().argsort().double()
    count, layers, _ = routed.shape
    num_experts = int(routed.max()) + 1 if routed.numel() else 0
    chosen = torch.zeros(count, layers, num_experts, dtype=torch.float64).scatter_(2, routed, 1.0)
    inside = chosen.sum(0)
    outside = count - inside
    statistic = torch.einsum("n,nle->le", ranks, chosen) - inside * (inside - 1) / 2
    spread = (inside * outside * (count + 1) / 12).sqrt()
    scores = (statistic - inside * outside / 2) / spread
    return scores.masked_fill((inside < MIN_TOKENS) | (outside < MIN_TOKENS), torch.nan)


def suspicious_expert(golden: Golden, positions: list[Position]) -> ExpertFinding | None:
    """The expert whose tokens are far off while others are not, if there is one."""
    scores = expert_scores(golden, positions)
    if not scores.numel() or scores.isnan().all():
        return None
    flat = int(scores.nan_to_num(-torch.inf).argmax())
    layer, expert = divmod(flat, scores.shape[1])
    mine = torch.tensor([bool((golden.prompts[p.prompt].experts[p.index, layer] == expert).any()) for p in positions])
    values = torch.tensor([position.kl for position in positions], dtype=torch.float64)
    ratio = float(values[mine].median() / values[~mine].median().clamp(min=1e-12))
    score = float(scores[layer, expert])
    if score < MIN_SCORE or ratio < MIN_RATIO:
        return None
    return ExpertFinding(golden.info["first_moe_layer"] + layer, expert, int(mine.sum()), score, ratio)
