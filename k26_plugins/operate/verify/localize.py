"""Where a fault sits: which tokens are further off than rounding explains, and what those tokens have in common.

Each place that a fault may sit in says which positions it would touch: a routed expert those whose token went there, a wrong
bias of the router those whose token almost went there (or almost did not), a wrong rotation the later positions of a prompt.
What is ranked is the distance over the distance that rounding makes at the same position: rounding has its own hard tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from k26_plugins.operate.golden import Golden
from k26_plugins.operate.verify.measure import Position

# Standard deviations of a rank test. The published model has 23,040 experts, of which chance takes one to 4.3, and as many
# biases with two signs and five sizes, of which it takes one to 4.8. The largest of 50 clean runs was 4.6.
MIN_SCORE = 6.0
# The distances over rounding's, touched positions against the others. Another rounding moves tokens of some experts more
# than others', and with enough tokens any difference is beyond chance.
MIN_RATIO = 1.25
# The same where all positions are off: what is wrong in every token's path moves some experts' tokens more, and not by much.
MIN_RATIO_EVERYWHERE = 3.0
# Fewer positions than these say nothing.
MIN_TOKENS = 5
# By how much a bias may be off, in units of the router's scores, which lie between 0 and 1.
BIAS_ERRORS = (0.003, 0.01, 0.03, 0.1, 0.3)
# A place is named where its score is this many times the next one's.
STANDS_OUT = 1.2

EXPERT, BIAS_HIGH, BIAS_LOW, ROTATION = "expert", "bias too high", "bias too low", "rotation"
# None of its tokens reaches an expert, or its weights are wrong: the same tokens are off.
EITHER = "expert or bias"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a fault may sit, and how well that explains which positions are off."""

    kind: str
    layer: int
    """−1 for what has none."""
    expert: int
    tokens: int
    """Positions that it would touch."""
    score: float
    """How many standard deviations these rank above the others."""
    ratio: float
    """Their median distance over rounding's, over that of the others."""

    @property
    def found(self) -> bool:
        return self.score >= MIN_SCORE and self.ratio >= MIN_RATIO

    @property
    def what(self) -> str:
        if self.kind == ROTATION:
            return "positions (rotary embedding) or attention"
        if self.kind == EXPERT:
            return f"routed expert {self.expert} of layer {self.layer}"
        bias = f"the router's bias of expert {self.expert} in layer {self.layer}"
        if self.kind == EITHER:
            return f"routed expert {self.expert} of layer {self.layer} (or {bias}, far too low)"
        return f"{bias}, {self.kind.removeprefix('bias ')}"

    def is_same(self, other: Place) -> bool:
        """Whether both are of one expert: its weights and its bias touch the same tokens, or some of them."""
        return (self.layer, self.expert) == (other.layer, other.expert)


class Localizer:
    """The rank tests over the positions of one endpoint."""

    def __init__(self, golden: Golden, positions: list[Position]) -> None:
        self.first_layer, self.num_experts = int(golden.info["first_moe_layer"]), int(golden.info["num_experts"])
        kl, noise = (
            torch.tensor([getattr(p, name) for p in positions], dtype=torch.float64) for name in ("kl", "noise")
        )
        # Far below what rounding makes nothing is told apart.
        floor = max(float(noise.median()) / 100, 1e-12)
        values = (kl + floor).log() - (noise + floor).log()
        self.raw = values.clone()
        # Images and answers may be off as a whole, which is no matter of experts.
        for kind in {position.kind for position in positions}:
            mine = torch.tensor([position.kind == kind for position in positions])
            values[mine] -= values[mine].median()
        self.values = values
        self.ranks = values.argsort().argsort().double()
        self.index = torch.tensor([position.index for position in positions])
        self.experts = torch.stack([golden.prompts[p.prompt].experts[p.index] for p in positions]).long()
        self.gaps = torch.stack([golden.prompts[p.prompt].gaps[p.index] for p in positions])

    @property
    def layers(self) -> int:
        return self.experts.shape[1]

    def touched(self, kind: str, error: float = 0.0) -> torch.Tensor:
        """bool `[positions, layers, K + N]`: of which of a token's experts a fault of this kind touches the token."""
        if kind == EXPERT:
            return self.gaps >= 0
        return (self.gaps < 0) & (self.gaps > -error) if kind == BIAS_HIGH else (self.gaps >= 0) & (self.gaps < error)

    def scores(self, kind: str, error: float = 0.0) -> torch.Tensor:
        """For each layer and expert, by how many standard deviations the touched positions rank above the others.

        `[layers, experts]`, NaN where too few are touched, or are not.
        """
        count, touched = len(self.values), self.touched(kind, error)
        ranks = self.ranks[:, None, None].expand(touched.shape)[touched]
        inside = self._by_expert(touched)
        total = self._by_expert(touched, ranks)
        outside = count - inside
        statistic = total - inside * (inside - 1) / 2
        scores = (statistic - inside * outside / 2) / (inside * outside * (count + 1) / 12).sqrt()
        few = (inside < MIN_TOKENS) | (outside < MIN_TOKENS)
        return scores.masked_fill(few, torch.nan).view(self.layers, self.num_experts)

    def _by_expert(self, touched: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """float64 `[layers · experts]`: how many positions are touched by each, or the sum of their weights."""
        key = (self.experts + torch.arange(self.layers)[:, None] * self.num_experts)[touched]
        return torch.bincount(key, weights=weights, minlength=self.layers * self.num_experts).double()

    @cached_property
    def places(self) -> list[Place]:
        """The likeliest places, the best first, each once."""
        if len(self.values) < 2 * MIN_TOKENS:
            return []
        found = [self._rotation()]
        if self.experts.numel():
            for kind, error in _kinds():
                found += self._best(kind, error, 2)
        found.sort(key=lambda place: -place.score)
        places: list[Place] = []
        for place in found:
            if not any(place.is_same(other) for other in places):
                places.append(place)
        return places

    def named(self) -> Place | None:
        """The place that a fault was found in and that stands out against the next one."""
        best = next((place for place in self.places if place.found), None)
        if best is None or (not self.spares_most and best.ratio < MIN_RATIO_EVERYWHERE):
            return None
        if any(
            best.score < STANDS_OUT * other.score for other in self.places if other is not best and other.ratio >= 1
        ):
            return None
        return self._weights_or_bias(best)

    def _weights_or_bias(self, place: Place) -> Place:
        """A bias that is too low touches those of an expert's tokens that were near the edge of the choice, weights all."""
        if place.kind not in (EXPERT, BIAS_LOW):
            return place
        layer = place.layer - self.first_layer
        hers = self.experts[:, layer] == place.expert
        everyone = (self.touched(EXPERT)[:, layer] & hers).any(-1)
        for error in BIAS_ERRORS:
            near = (self.touched(BIAS_LOW, error)[:, layer] & hers).any(-1)
            rest = everyone & ~near
            if int(near.sum()) < MIN_TOKENS:
                continue
            if int(rest.sum()) < MIN_TOKENS:
                return replace(place, kind=EITHER)
            if self._ratio(near, ~everyone) >= MIN_RATIO > self._ratio(rest, ~everyone) ** 0.5:
                score = float(self.scores(BIAS_LOW, error)[layer, place.expert])
                return replace(
                    place, kind=BIAS_LOW, tokens=int(near.sum()), score=score, ratio=self._ratio(near, ~near)
                )
        return replace(place, kind=EXPERT, tokens=int(everyone.sum()))

    @property
    def spares_most(self) -> bool:
        """Whether a good part of the positions is as near as rounding leaves them."""
        return bool(self.raw.quantile(0.1) < math.log(2))

    def sensitivity(self) -> str:
        """The smallest faults of single experts that these positions would show."""
        count, total = len(self.values), self.num_experts * self.layers
        if count < 2 * MIN_TOKENS or not total:
            return "too few positions to find a fault of one expert"
        tokens = self._by_expert(self.touched(EXPERT))
        # How often a touched position must rank above an untouched one for the score to be MIN_SCORE.
        needed = 0.5 + MIN_SCORE * ((count + 1) / (12 * tokens * (count - tokens)).clamp(min=1e-9)).sqrt()
        seen = (needed < 1) & (tokens >= MIN_TOKENS) & (count - tokens >= MIN_TOKENS)
        blind = f"{total - int(seen.sum()):,} of {total:,} experts saw too few tokens to be judged"
        if not seen.any():
            return blind
        shuffled = self.values[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
        ratios = (self.values - shuffled).quantile(needed[seen]).exp().clamp(min=MIN_RATIO)
        return (
            f"an expert whose tokens are {ratios.median():.1f} times as far off as rounding makes them is found for half of "
            f"the experts that saw enough tokens, {ratios.quantile(0.9):.1f} times for nine of ten; {blind}"
        )

    def _best(self, kind: str, error: float, number: int) -> Iterator[Place]:
        scores = self.scores(kind, error).nan_to_num(-math.inf).flatten()
        for score, flat in zip(*(values.tolist() for values in scores.topk(min(number, len(scores)))), strict=True):
            if math.isfinite(score):
                layer, expert = divmod(flat, self.num_experts)
                mine = (self.touched(kind, error) & (self.experts == expert))[:, layer].any(-1)
                yield Place(kind, self.first_layer + layer, expert, int(mine.sum()), score, self._ratio(mine, ~mine))

    def _rotation(self) -> Place:
        """A wrong rotation shows in the correlation of ranks between a position's distance and its place in the prompt."""
        places = self.index.double().argsort().argsort().double()
        score = float(torch.corrcoef(torch.stack((self.ranks, places)))[0, 1]) * math.sqrt(len(self.values) - 1)
        late = self.index > self.index.median()
        return Place(ROTATION, -1, -1, int(late.sum()), score, self._ratio(late, ~late))

    def _ratio(self, mine: torch.Tensor, others: torch.Tensor) -> float:
        if not others.any() or not mine.any():
            return 1.0
        return float((self.values[mine].median() - self.values[others].median()).exp())


def _kinds() -> Iterator[tuple[str, float]]:
    yield EXPERT, 0.0
    for error in BIAS_ERRORS:
        yield BIAS_HIGH, error
        yield BIAS_LOW, error
