"""A needle in a long prompt: whether the server still finds one line among thousands. Long context fails in ways of its own.

Every line looks like the needle and has another number, so that an answer by guess or from a nearby place is wrong.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from k26_plugins.operate.verify.endpoint import Endpoint, EndpointError

LENGTHS = (8_000, 70_000, 200_000)
"""Prompt tokens, about."""
DEPTHS = (0.1, 0.5, 0.9)
"""Where the needle lies, as a share of the whole prompt."""
TOKENS_OF_A_LINE = 14
"""Kimi's tokenizer makes 13.6 of a line, as measured."""
ANSWER_TOKENS = 512
COLOURS = ("red", "green", "blue", "black", "white", "brown", "grey", "pink", "golden", "silver")


@dataclass(frozen=True, slots=True)
class Found:
    """One question."""

    tokens: int
    """Tokens of the prompt, as the server counts them, or as they were planned where it does not say."""
    depth: float
    right: bool
    note: str = ""
    """Why it was not asked."""


def haystack(tokens: int, depth: float, seed: int) -> tuple[str, str]:
    """A prompt of about so many tokens, and the number that answers it."""
    rng = random.Random(seed)
    count = max(tokens // TOKENS_OF_A_LINE, len(COLOURS))
    numbers = rng.sample(range(100_000, 1_000_000), count)
    lines = [f"Box {index} is {rng.choice(COLOURS)} and holds {number}." for index, number in enumerate(numbers)]
    asked = min(int(depth * count), count - 1)
    question = f"What number does box {asked} hold? Answer with the number only."
    return "\n".join([*lines, "", question]), str(numbers[asked])


def find_needles(endpoint: Endpoint, on_question: Callable[[int], None] = lambda done: None) -> list[Found]:
    """Ask at every length that the server's context allows, and at every depth."""
    limit = endpoint.context_length()
    found: list[Found] = []
    for tokens in LENGTHS:
        for depth in DEPTHS:
            if limit is not None and tokens * 1.1 + ANSWER_TOKENS > limit:
                found.append(Found(tokens, depth, False, f"the server's context is {limit:,} tokens"))
            else:
                found.append(_ask(endpoint, tokens, depth))
            on_question(len(found))
    return found


def _ask(endpoint: Endpoint, tokens: int, depth: float) -> Found:
    text, expected = haystack(tokens, depth, seed=tokens)
    try:
        body = endpoint.chat(
            [{"role": "user", "content": text}],
            temperature=0,
            max_tokens=ANSWER_TOKENS,
            chat_template_kwargs={"thinking": False},
        )
    except EndpointError as error:
        return Found(tokens, depth, False, str(error))
    counted = int((body.get("usage") or {}).get("prompt_tokens") or tokens)
    return Found(counted, depth, expected in (body["choices"][0]["message"].get("content") or ""))
