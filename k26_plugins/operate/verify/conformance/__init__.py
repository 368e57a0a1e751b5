"""Test an endpoint's conformance in the way of the published suite for this model, Kimi-Vendor-Verifier.

The cases are this project's own. They are about prompt tokens with images, parameters that must be refused or honoured,
and tool calls by their schema, whole and streamed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from k26_plugins.operate.verify.conformance import counts, parameters, schemas
from k26_plugins.operate.verify.conformance.case import FAIL, NOT_ASKED, PASS, Case, Chat, Outcome, outcome_of
from k26_plugins.operate.verify.endpoint import Endpoint

__all__ = ["ANSWER_TOKENS", "CASES", "FAIL", "NOT_ASKED", "PASS", "Case", "Outcome", "check_conformance"]

CASES: tuple[Case, ...] = (*counts.cases(), *parameters.cases(), *schemas.cases())
ANSWER_TOKENS = 512
"""The token limit of answers that are expected to end by themselves."""


def check_conformance(
    endpoint: Endpoint,
    on_case: Callable[[int], None] = lambda done: None,
    *,
    cases: Sequence[Case] = CASES,
    max_tokens: int = ANSWER_TOKENS,
) -> list[Outcome]:
    """Ask the endpoint each case, and return the outcomes in the same order.

    on_case: called after each case with the number of cases so far. max_tokens: limit of answers that are expected to
    end by themselves. Raises EndpointError if the endpoint does not answer a first chat.
    """
    chat = Chat(endpoint, max_tokens)
    chat.find_switch()
    found = []
    for number, case in enumerate(cases, 1):
        found.append(outcome_of(case, chat))
        on_case(number)
    return found
