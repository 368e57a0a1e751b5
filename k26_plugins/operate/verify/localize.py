"""Locate a fault: find the tokens that are further off than rounding explains, and what these tokens have in common.

Each place where a fault may sit implies which positions the fault would touch. A faulty routed expert touches the
positions whose token was routed to it. A wrong bias of the router touches those whose token was almost routed to its
expert, or almost was not. A wrong rotation touches the later positions of a prompt. Positions are ranked by their
distance divided by the distance that rounding makes at the same position, because some tokens are hard for rounding
alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from k26_plugins.operate.golden import Golden
from k26_plugins.operate.verify.measure import Position

# The score from which on a place is found, in standard deviations of a rank test. The published model has 23,040 routed
# experts, and chance alone lifts one of them to 4.3. It has as many biases, each tested with two signs and five sizes,
# and chance alone lifts one of these to 4.8. The largest score of 50 clean runs was 4.6.
MIN_SCORE = 6.0
# The ratio from which on a place is found: by how much the touched positions are further off than the others, both
# relative to rounding. An engine that rounds in its own way moves the tokens of some experts more than those of others,
# and with enough tokens any such difference is beyond chance, so that the score alone would find it.
MIN_RATIO = 1.25
# The ratio that is needed if all positions are off: a fault in the path of every token moves the tokens of some experts
# more than others, too, but not by much.
MIN_RATIO_EVERYWHERE = 3.0
# A test needs at least this many positions that are touched, and as many that are not.
MIN_TOKENS = 5
# Errors of a bias that are tested, in units of the router's scores, which lie between 0 and 1.
BIAS_ERRORS = (0.003, 0.01, 0.03, 0.1, 0.3)
# A place is named only if its score is at least this many times the next one's.
STANDS_OUT = 1.2

EXPERT, BIAS_HIGH, BIAS_LOW, ROTATION = "expert", "bias too high", "bias too low", "rotation"
# The expert's weights are wrong, or its bias is so low that no token reaches it: both put the same tokens off.
EITHER = "expert or bias"


@dataclass(frozen=True, slots=True)
class Place:
    """A place where a fault may sit, and how well it explains which positions are off."""

    kind: str
    """EXPERT, BIAS_HIGH, BIAS_LOW, EITHER or ROTATION."""
    layer: int
    """The decoder layer's index; −1 for ROTATION."""
    expert: int
    """The routed expert's index in the layer; −1 for ROTATION."""
    tokens: int
    """Number of positions that the fault would touch."""
    score: float
    """How many standard deviations the touched positions rank above the others."""
    ratio: float
    """Median of the distance over rounding's at the touched positions, divided by the same median at the others."""

    @property
    def found(self) -> bool:
        """Whether score and ratio are those of a fault, and not of chance."""
        return self.score >= MIN_SCORE and self.ratio >= MIN_RATIO

    @property
    def what(self) -> str:
        """The place in words, for a report."""
        if self.kind == ROTATION:
            return "positions (rotary embedding) or attention"
        if self.kind == EXPERT:
            return f"routed expert {self.expert} of layer {self.layer}"
        bias = f"the router's bias of expert {self.expert} in layer {self.layer}"
        if self.kind == EITHER:
            return f"routed expert {self.expert} of layer {self.layer} (or {bias}, far too low)"
        return f"{bias}, {self.kind.removeprefix('bias ')}"

    def is_same(self, other: Place) -> bool:
        """Return whether both places are of the same expert.

        A bias that is too low touches some of the tokens that wrong weights of the expert touch.
        """
        return (self.layer, self.expert) == (other.layer, other.expert)


class Localizer:
    """The rank tests of every place where a fault may sit, over the positions of one endpoint."""

    def __init__(self, golden: Golden, positions: list[Position]) -> None:
        self.first_layer, self.num_experts = int(golden.info["first_moe_layer"]), int(golden.info["num_experts"])
        kl, noise = (
            torch.tensor([getattr(p, name) for p in positions], dtype=torch.float64) for name in ("kl", "noise")
        )
        # Distances far below rounding's are all alike: their order means nothing.
        floor = max(float(noise.median()) / 100, 1e-12)
        values = (kl + floor).log() - (noise + floor).log()
        self.raw = values.clone()
        # Positions of one kind, such as images, may be off as a whole, which no single expert causes: hence the
        # medians.
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
        """Number of MoE layers."""
        return self.experts.shape[1]

    def touched(self, kind: str, error: float = 0.0) -> torch.Tensor:
        """Return which of a token's experts would touch the token if they had a fault of this kind.

        The result is bool `[positions, layers, K + N]`: the K experts that the token was routed to, and the N that came
        next. error: by how much the bias is off, in the router's scores; not used for EXPERT.
        """
        if kind == EXPERT:
            return self.gaps >= 0
        return (self.gaps < 0) & (self.gaps > -error) if kind == BIAS_HIGH else (self.gaps >= 0) & (self.gaps < error)

    def scores(self, kind: str, error: float = 0.0) -> torch.Tensor:
        """Return for each layer and expert by how many standard deviations the touched positions rank above the others.

        The result is float64 `[layers, experts]`, NaN where too few positions are touched, or too few are not. kind,
        error: as for `touched`.
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
        """Return how many positions each expert touches, or the sum of their weights: float64 `[layers · experts]`."""
        key = (self.experts + torch.arange(self.layers)[:, None] * self.num_experts)[touched]
        return torch.bincount(key, weights=weights, minlength=self.layers * self.num_experts).double()

    @cached_property
    def places(self) -> list[Place]:
        """The likeliest places, the one with the highest score first, and each expert only once."""
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
        """Return the place in which a fault was found and which stands out against the next one, or None."""
        best = next((place for place in self.places if place.found), None)
        if best is None or (not self.spares_most and best.ratio < MIN_RATIO_EVERYWHERE):
            return None
        if any(
            best.score < STANDS_OUT * other.score for other in self.places if other is not best and other.ratio >= 1
        ):
            return None
        return self._weights_or_bias(best)

    def _weights_or_bias(self, place: Place) -> Place:
        """Decide whether an expert's weights are wrong or its bias is too low, and return the place with this kind.

        Wrong weights put all of the expert's tokens off. A bias that is too low puts only those tokens off that were
        near the edge of the choice. The kind is EITHER if all of the tokens were near the edge.
        """
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
        """Whether at least a tenth of the positions is less than twice as far off as rounding makes them."""
        return bool(self.raw.quantile(0.1) < math.log(2))

    def sensitivity(self) -> str:
        """Return in words how small a fault of a single expert these positions would show."""
        count, total = len(self.values), self.num_experts * self.layers
        if count < 2 * MIN_TOKENS or not total:
            return "too few positions to find a fault of one expert"
        tokens = self._by_expert(self.touched(EXPERT))
        # The share of pairs of a touched and an untouched position in which the touched one must rank higher for the
        # score to be MIN_SCORE.
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
        """Yield the `number` places with the highest scores for this kind of fault."""
        scores = self.scores(kind, error).nan_to_num(-math.inf).flatten()
        for score, flat in zip(*(values.tolist() for values in scores.topk(min(number, len(scores)))), strict=True):
            if math.isfinite(score):
                layer, expert = divmod(flat, self.num_experts)
                mine = (self.touched(kind, error) & (self.experts == expert))[:, layer].any(-1)
                yield Place(kind, self.first_layer + layer, expert, int(mine.sum()), score, self._ratio(mine, ~mine))

    def _rotation(self) -> Place:
        """Return the place ROTATION, whose score is the rank correlation of a position's distance and its index.

        A wrong rotation puts positions the further off the later they are in the prompt.
        """
        places = self.index.double().argsort().argsort().double()
        score = float(torch.corrcoef(torch.stack((self.ranks, places)))[0, 1]) * math.sqrt(len(self.values) - 1)
        late = self.index > self.index.median()
        return Place(ROTATION, -1, -1, int(late.sum()), score, self._ratio(late, ~late))

    def _ratio(self, mine: torch.Tensor, others: torch.Tensor) -> float:
        """Return `Place.ratio` for two masks over the positions; 1.0 if one of them is empty."""
        if not others.any() or not mine.any():
            return 1.0
        return float((self.values[mine].median() - self.values[others].median()).exp())


def _kinds() -> Iterator[tuple[str, float]]:
    """Yield every fault of an expert that is tested: its kind, and by how much the bias is off."""
    yield EXPERT, 0.0
    for error in BIAS_ERRORS:
        yield BIAS_HIGH, error
        yield BIAS_LOW, error
