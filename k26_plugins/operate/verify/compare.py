"""Compare several endpoints with each other, without a golden file.

The comparison shows whether the endpoints agree, not whether they are right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import mean, median
from typing import Any

from k26_plugins.operate.golden import Prompt
from k26_plugins.operate.verify.distance import allowed_share, kl_of_reported, share_above
from k26_plugins.operate.verify.endpoint import Distribution, Endpoint, EndpointError, Rendered
from k26_plugins.operate.verify.judge import Check

# Bound of the median KL: docs/design.md has this bound for an engine's mean divergence from the reference. Two engines
# that differ only by rounding stay within it.
TYPICAL = 1e-3
# A position counts as far off above this KL; about LARGE_SHARE of the positions may be.
LARGE = 0.1
LARGE_SHARE = 0.05


@dataclass(slots=True)
class Said:
    """One endpoint's answer to one prompt."""

    rendered: Rendered
    prompt: dict[int, Distribution] = field(default_factory=dict)
    """The distribution after each position of the prompt; empty if the endpoint reports none."""
    answer: Sequence[Mapping[Any, float]] = ()
    """Distributions of a greedy answer's tokens. Keys are the tokens' bytes, or token ids if the prompt is raw text."""


@dataclass(slots=True)
class Pair:
    """The comparison of two endpoints, which are numbered from 0 in the order of the command line."""

    first: int
    second: int
    compared: int = 0
    """Number of prompts that both endpoints were asked."""
    differently_rendered: list[str] = field(default_factory=list)
    """A line for each prompt that the two endpoints turn into different tokens."""
    groups: dict[str, list[float]] = field(default_factory=dict)
    """KL at each position that both endpoints report, by group: text prompts, prompts with images, answers."""
    parted: list[str] = field(default_factory=list)
    """A line for each prompt whose greedy answers differ, with the first token that does."""
    not_shown: list[str] = field(default_factory=list)
    """A line for each prompt that one of the two endpoints cannot be asked, with the reason."""

    @property
    def kl(self) -> list[float]:
        """The KL of all groups in one list."""
        return [value for group in self.groups.values() for value in group]

    @property
    def checks(self) -> list[Check]:
        """Checks that both endpoints make the same tokens, and that rounding can account for the KL of each group."""
        wrong = len(self.differently_rendered)
        alike = f"{self.compared - wrong} of {self.compared} prompts become the same tokens"
        found = [Check("rendering and tokens", not wrong, "; ".join([alike, *self.differently_rendered]))]
        for name, group in self.groups.items():
            typical, share = median(group), share_above(group, LARGE)
            allowed = allowed_share(LARGE_SHARE, len(group))
            detail = (
                f"median KL {typical:.1e} (bound {TYPICAL:.0e}), mean {mean(group):.1e}, above {LARGE} at {share:.1%} of "
                f"{len(group)} positions (bound {allowed:.1%})"
            )
            found.append(Check(name, typical <= TYPICAL and share <= allowed, detail))
        if not self.groups:
            found.append(Check("distributions", False, "the two report none of the same positions"))
        return found

    @property
    def agree(self) -> bool:
        """Whether all checks passed."""
        return all(check.passed for check in self.checks)


def compare(
    endpoints: Sequence[Endpoint],
    prompts: Sequence[Prompt],
    on_prompt: Callable[[int], None] = lambda done: None,
    *,
    answer_tokens: int = 8,
    top: int = 20,
) -> list[Pair]:
    """Ask all endpoints every prompt, and return the comparison of every pair of endpoints.

    on_prompt: called after each prompt with the number of prompts so far. answer_tokens: length of each greedy answer.
    top: how many of the likeliest tokens are asked for at each position. Raises EndpointError if an endpoint cannot be
    asked, or if no two endpoints report log-probabilities of the same positions.
    """
    pairs = [Pair(first, second) for first, second in combinations(range(len(endpoints)), 2)]
    for number, prompt in enumerate(prompts, 1):
        ask = _ask if "messages" in prompt.request else _ask_raw
        said = ask(endpoints, prompt, answer_tokens, top)
        for pair in pairs:
            first, second = said[pair.first], said[pair.second]
            if first is None or second is None:
                pair.not_shown.append(f"{prompt.name}: a prompt of raw text, and one of the two takes messages only")
            else:
                _hold(pair, prompt, first, second)
        on_prompt(number)
    if not any(pair.kl for pair in pairs):
        raise EndpointError(
            "no two endpoints report log-probabilities of the same positions: there is nothing to compare."
        )
    return pairs


def _ask(endpoints: Sequence[Endpoint], prompt: Prompt, answer_tokens: int, top: int) -> list[Said | None]:
    said = [Said(endpoint.rendered(prompt)) for endpoint in endpoints]
    # The first endpoint that reports the prompt's token ids gives them to all endpoints that take token ids.
    known = next((entry.rendered.token_ids for entry in said if entry.rendered.token_ids), None)
    for endpoint, entry in zip(endpoints, said, strict=True):
        if endpoint.reports_prompt and known and (endpoint.renders_images or not prompt.images):
            prompt.token_ids = known
            entry.prompt = endpoint.prompt(prompt, top)
        entry.answer = endpoint.answer_as_text(prompt, answer_tokens, top)
    return [*said]


def _ask_raw(endpoints: Sequence[Endpoint], prompt: Prompt, answer_tokens: int, top: int) -> list[Said | None]:
    """Ask each endpoint a prompt of raw text, which it tokenizes itself; give None for one that takes messages only."""
    said: list[Said | None] = []
    for endpoint in endpoints:
        if endpoint.reports_prompt:
            answer = endpoint.answer(prompt, answer_tokens, top).distributions
            said.append(Said(endpoint.rendered(prompt), endpoint.prompt(prompt, top), answer))
        else:
            said.append(None)
    return said


def _hold(pair: Pair, prompt: Prompt, first: Said, second: Said) -> None:
    """Add to a pair what its two answers to one prompt show."""
    pair.compared += 1
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


def _chosen(distribution: Mapping[Any, float]) -> str:
    """Return the token that a greedy answer takes from this distribution, the likeliest one, in readable form."""
    token = max(distribution, key=distribution.__getitem__)
    return token.decode("utf-8", "replace") if isinstance(token, bytes) else f"token {token}"
