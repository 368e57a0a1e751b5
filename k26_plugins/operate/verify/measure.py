"""Ask an endpoint every prompt of a golden file, and measure at each position how far it is from the reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from k26_plugins.operate.golden import Golden, GoldenPrompt
from k26_plugins.operate.verify.distance import kl_of_reported
from k26_plugins.operate.verify.endpoint import Distribution, Endpoint, EndpointError
from k26_plugins.operate.verify.rendering import Mismatch, compare_rendering

TEXT, IMAGE, ANSWER = "text", "image", "answer"


@dataclass(slots=True)
class Position:
    """One distribution that the endpoint reported, with its distances."""

    prompt: int
    """Number of the prompt in the golden file."""
    index: int
    """Index of the token that the distribution follows."""
    kind: str
    """`text` or `image`, whichever the token at `index` is; `answer` from the prompt's last token on."""
    kl: float
    """KL divergence from the reference to the endpoint."""
    noise: float
    """KL divergence from the reference to the bf16 baseline, over the same tokens."""
    suspects: dict[str, float] = field(default_factory=dict)
    """KL divergence from each suspect (a model with a known mistake) to the endpoint, by the suspect's name."""


@dataclass(slots=True)
class Measured:
    """Everything that was measured of one endpoint."""

    engine: str
    url: str
    mismatches: list[Mismatch] = field(default_factory=list)
    """Prompts for which the endpoint's tokens differ from the golden ones."""
    rendered: int = 0
    """Number of prompts whose rendering was compared."""
    positions: list[Position] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    """Prompts that the endpoint did not answer, each with the endpoint's message."""
    not_shown: list[str] = field(default_factory=list)
    """What the endpoint does not report, and why."""


def measure(
    endpoint: Endpoint, golden: Golden, on_prompt: Callable[[int], None] = lambda done: None, *, top: int = 20
) -> Measured:
    """Ask the endpoint every prompt of the golden file, and return what was measured.

    on_prompt: called after each prompt with the number of prompts so far. top: how many of the likeliest tokens to ask
    for at each position. Raises EndpointError if the endpoint answers no prompt at all, or reports no
    log-probabilities.
    """
    endpoint.token_bytes = {bytes.fromhex(raw): int(token) for token, raw in golden.info["token_bytes"].items()}
    found = Measured(endpoint.engine, endpoint.url)
    for number, prompt in enumerate(golden.prompts):
        if "messages" not in prompt.request and not endpoint.reports_prompt:
            found.not_shown.append(f"{prompt.name}: a prompt of raw text, and the endpoint takes messages only")
        else:
            try:
                _measure_rendering(endpoint, golden, prompt, found)
                _measure_prompt(endpoint, golden, number, top, found)
            except EndpointError as error:
                found.refused.append(f"{prompt.name}: {error}")
        on_prompt(number + 1)
    if len(found.refused) == len(golden.prompts):
        raise EndpointError(found.refused[0])
    if not endpoint.reports_prompt:
        found.not_shown.append("distributions of the prompts' own tokens: the endpoint reports its answers only")
    if not found.positions:
        raise EndpointError(
            f"{endpoint.url} ({endpoint.engine}) reports no log-probabilities: ask for them where the engine is started "
            f"(vLLM's --max-logprobs must be at least {top})."
        )
    return found


def _measure_rendering(endpoint: Endpoint, golden: Golden, prompt: GoldenPrompt, found: Measured) -> None:
    if "messages" not in prompt.request:
        return
    rendered = endpoint.rendered(prompt.prompt)
    found.rendered += 1
    mismatch = compare_rendering(prompt.prompt, rendered, golden.info["special_tokens"])
    if mismatch:
        found.mismatches.append(mismatch)


def _measure_prompt(endpoint: Endpoint, golden: Golden, number: int, top: int, found: Measured) -> None:
    prompt = golden.prompts[number]
    reported = endpoint.prompt(prompt.prompt, top) if endpoint.reports_prompt else {}
    if reported and max(reported) != prompt.num_prompt_tokens - 2:
        # The endpoint's prompt has another length, so its positions do not stand for the same tokens.
        found.not_shown.append(f"{prompt.name}: its prompt has {max(reported) + 2} tokens in the endpoint")
        reported = {}
    start = prompt.num_prompt_tokens - 1
    expected = prompt.token_ids[prompt.num_prompt_tokens :]
    answer = endpoint.answer(prompt.prompt, len(expected), top)
    for offset, distribution in enumerate(answer.distributions):
        reported[start + offset] = distribution
        # After the first token that differs, endpoint and reference continue different texts.
        if offset >= len(expected) - 1 or answer.token_ids[offset] != expected[offset]:
            break
    placeholder = golden.info["media_placeholder_token_id"]
    for index, distribution in sorted(reported.items()):
        if index < 0 or index >= len(prompt.top_ids):
            continue
        kind = ANSWER if index >= start else IMAGE if prompt.token_ids[index] == placeholder else TEXT
        position = _position(prompt, number, index, kind, distribution)
        if not math.isnan(position.kl):
            found.positions.append(position)


def _position(prompt: GoldenPrompt, number: int, index: int, kind: str, distribution: Distribution) -> Position:
    """Return the distances at one position, over the tokens that both the golden file and the endpoint report."""
    ids = prompt.top_ids[index].tolist()

    def kept(logprobs: torch.Tensor) -> Distribution:
        return {
            token: value for token, value in zip(ids, logprobs[index].tolist(), strict=True) if token in distribution
        }

    expected = kept(prompt.top_logprobs)
    return Position(
        prompt=number,
        index=index,
        kind=kind,
        kl=kl_of_reported(expected, distribution),
        noise=kl_of_reported(expected, kept(prompt.baseline_logprobs)),
        suspects={
            name: kl_of_reported(kept(logprobs), distribution)
            for name, logprobs in prompt.suspects.items()
            if index < len(logprobs)
        },
    )
