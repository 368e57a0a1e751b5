"""Several endpoints against each other, without a golden file: whether they agree, not whether they are right."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import mean, median
from typing import Any

from k26_plugins.operate.golden import Prompt
from k26_plugins.operate.verify.distance import allowed_share, kl_of_reported, share_above
from k26_plugins.operate.verify.endpoint import Distribution, Endpoint, EndpointError, Rendered

# The design's bound on an engine's mean divergence. Two engines that round differ by no more.
TYPICAL = 1e-3
LARGE = 0.1
LARGE_SHARE = 0.05


@dataclass(slots=True)
class Said:
    """What one endpoint answered to one prompt."""

    rendered: Rendered
    prompt: dict[int, Distribution] = field(default_factory=dict)
    answer: list[dict[bytes, float]] = field(default_factory=list)


@dataclass(slots=True)
class Pair:
    """Two endpoints, by their numbers on the command line."""

    first: int
    second: int
    differently_rendered: list[str] = field(default_factory=list)
    groups: dict[str, list[float]] = field(default_factory=dict)
    """KL of the positions that both report: of text prompts, of prompts with images, of answers."""
    parted: list[str] = field(default_factory=list)
    """Prompts whose greedy answers part, and where."""

    @property
    def kl(self) -> list[float]:
        return [value for group in self.groups.values() for value in group]

    @property
    def agree(self) -> bool:
        """Same prompts, and distributions that rounding can account for."""
        if self.differently_rendered or not self.kl:
            return False
        return all(
            median(group) <= TYPICAL and share_above(group, LARGE) <= allowed_share(LARGE_SHARE, len(group))
            for group in self.groups.values()
        )

    def as_json(self, urls: Sequence[str]) -> dict[str, Any]:
        return {
            "urls": [urls[self.first], urls[self.second]],
            "agree": self.agree,
            "differently_rendered": self.differently_rendered,
            "groups": {
                name: {"positions": len(group), "median_kl": median(group), "mean_kl": mean(group)}
                for name, group in self.groups.items()
            },
            "answers_part": self.parted,
        }


def compare(
    endpoints: Sequence[Endpoint],
    prompts: Sequence[Prompt],
    on_prompt: Callable[[int], None] = lambda done: None,
    *,
    answer_tokens: int = 8,
    top: int = 20,
) -> list[Pair]:
    """Ask all endpoints every prompt of messages; every pair of them. Raises EndpointError."""
    pairs = [Pair(first, second) for first, second in combinations(range(len(endpoints)), 2)]
    for number, prompt in enumerate(prompts, 1):
        if "messages" in prompt.request:
            said = _ask(endpoints, prompt, answer_tokens, top)
            for pair in pairs:
                _hold(pair, prompt, said[pair.first], said[pair.second])
        on_prompt(number)
    if not any(pair.kl for pair in pairs):
        raise EndpointError(
            "no two endpoints report log-probabilities of the same positions: there is nothing to compare."
        )
    return pairs


def _ask(endpoints: Sequence[Endpoint], prompt: Prompt, answer_tokens: int, top: int) -> list[Said]:
    said = [Said(endpoint.rendered(prompt)) for endpoint in endpoints]
    # Token ids for those that take them, from one that reports them.
    known = next((entry.rendered.token_ids for entry in said if entry.rendered.token_ids), None)
    for endpoint, entry in zip(endpoints, said, strict=True):
        if endpoint.reports_prompt and known and (endpoint.renders_images or not prompt.images):
            prompt.token_ids = known
            entry.prompt = endpoint.prompt(prompt, top)
        entry.answer = endpoint.answer_as_text(prompt, answer_tokens, top)
    return said


def _hold(pair: Pair, prompt: Prompt, first: Said, second: Said) -> None:
    both = first.rendered.token_ids, second.rendered.token_ids
    same = both[0] == both[1] if all(both) else first.rendered.count == second.rendered.count
    if not same:
        counts = first.rendered.count, second.rendered.count
        pair.differently_rendered.append(f"{prompt.name}: {counts[0]} and {counts[1]} prompt tokens")
    for index in sorted(first.prompt.keys() & second.prompt.keys()):
        group = pair.groups.setdefault("prompts with images" if prompt.images else "prompts", [])
        group.append(kl_of_reported(first.prompt[index], second.prompt[index]))
    for index, (one, other) in enumerate(zip(first.answer, second.answer, strict=False)):
        pair.groups.setdefault("answers", []).append(kl_of_reported(one, other))
        chosen = _chosen(one), _chosen(other)
        if chosen[0] != chosen[1]:
            pair.parted.append(f"{prompt.name}: token {index + 1} is {chosen[0]!r} and {chosen[1]!r}")
            break


def _chosen(distribution: Mapping[bytes, float]) -> str:
    return next(iter(distribution)).decode("utf-8", "replace")
