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
from k26_plugins.operate.verify.judge import Check

# The bound of docs/design.md on an engine's mean divergence. Two engines that round differ by no more.
TYPICAL = 1e-3
LARGE = 0.1
LARGE_SHARE = 0.05


@dataclass(slots=True)
class Said:
    """What one endpoint answered to one prompt."""

    rendered: Rendered
    prompt: dict[int, Distribution] = field(default_factory=dict)
    answer: Sequence[Mapping[Any, float]] = ()
    """The distribution of each token of a greedy answer: by the tokens' bytes, or by their ids after raw text."""


@dataclass(slots=True)
class Pair:
    """Two endpoints, by their numbers on the command line."""

    first: int
    second: int
    compared: int = 0
    """Prompts that both were asked."""
    differently_rendered: list[str] = field(default_factory=list)
    groups: dict[str, list[float]] = field(default_factory=dict)
    """KL of the positions that both report: of text prompts, of prompts with images, of answers."""
    parted: list[str] = field(default_factory=list)
    """Prompts whose greedy answers part, and where."""
    not_shown: list[str] = field(default_factory=list)
    """Prompts that one of them cannot be asked, and why."""

    @property
    def kl(self) -> list[float]:
        return [value for group in self.groups.values() for value in group]

    @property
    def checks(self) -> list[Check]:
        """Same prompts, and distributions that rounding can account for."""
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
        return all(check.passed for check in self.checks)


def compare(
    endpoints: Sequence[Endpoint],
    prompts: Sequence[Prompt],
    on_prompt: Callable[[int], None] = lambda done: None,
    *,
    answer_tokens: int = 8,
    top: int = 20,
) -> list[Pair]:
    """Ask all endpoints every prompt; every pair of them. Raises EndpointError."""
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
    # Token ids for those that take them, from one that reports them.
    known = next((entry.rendered.token_ids for entry in said if entry.rendered.token_ids), None)
    for endpoint, entry in zip(endpoints, said, strict=True):
        if endpoint.reports_prompt and known and (endpoint.renders_images or not prompt.images):
            prompt.token_ids = known
            entry.prompt = endpoint.prompt(prompt, top)
        entry.answer = endpoint.answer_as_text(prompt, answer_tokens, top)
    return [*said]


def _ask_raw(endpoints: Sequence[Endpoint], prompt: Prompt, answer_tokens: int, top: int) -> list[Said | None]:
    """A prompt of raw text, which each endpoint tokenizes itself; None of one that takes messages only."""
    said: list[Said | None] = []
    for endpoint in endpoints:
        if endpoint.reports_prompt:
            answer = endpoint.answer(prompt, answer_tokens, top).distributions
            said.append(Said(endpoint.rendered(prompt), endpoint.prompt(prompt, top), answer))
        else:
            said.append(None)
    return said


def _hold(pair: Pair, prompt: Prompt, first: Said, second: Said) -> None:
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
    """The answers are greedy."""
    token = max(distribution, key=distribution.__getitem__)
    return token.decode("utf-8", "replace") if isinstance(token, bytes) else f"token {token}"
