"""Ask for one line (the needle) of a long prompt, because long context fails in ways that short prompts do not show.

Every line of the prompt has the needle's form and its own number, so an answer that is guessed or taken from a nearby
line is wrong.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from k26_plugins.operate.verify.endpoint import Endpoint, EndpointError

LENGTHS = (8_000, 70_000, 200_000)
"""Approximate lengths of the prompts, in tokens."""
DEPTHS = (0.1, 0.5, 0.9)
"""Positions of the needle, as shares of the whole prompt."""
TOKENS_OF_A_LINE = 14
"""Tokens that a line is assumed to take; measured with Kimi's tokenizer, it is 13.6."""
ANSWER_TOKENS = 512
COLOURS = ("red", "green", "blue", "black", "white", "brown", "grey", "pink", "golden", "silver")


@dataclass(frozen=True, slots=True)
class Found:
    """The outcome of one question: one length of the prompt and one depth of the needle."""

    tokens: int
    """Tokens of the prompt as the server counts them; the planned number if the server did not report a count."""
    depth: float
    right: bool
    note: str = ""
    """Why there is no answer: the prompt does not fit into the server's context, or the request failed. Else empty."""


def haystack(tokens: int, depth: float, seed: int) -> tuple[str, str]:
    """Return a prompt of about `tokens` tokens, and the number that is the right answer to its question.

    depth: where the line that is asked for lies, from 0 to 1. seed: the same seed gives the same prompt.
    """
    rng = random.Random(seed)
    count = max(tokens // TOKENS_OF_A_LINE, len(COLOURS))
    numbers = rng.sample(range(100_000, 1_000_000), count)
    lines = [f"Box {index} is {rng.choice(COLOURS)} and holds {number}." for index, number in enumerate(numbers)]
    asked = min(int(depth * count), count - 1)
    question = f"What number does box {asked} hold? Answer with the number only."
    return "\n".join([*lines, "", question]), str(numbers[asked])


def find_needles(endpoint: Endpoint, on_question: Callable[[int], None] = lambda done: None) -> list[Found]:
    """Ask one question at every length and every depth, and return the outcomes in this order.

    A length for which the server's context has no room is not asked; its outcomes say why. on_question: called after
    each question with the number of questions so far.
    """
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
