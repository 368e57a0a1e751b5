"""What published conformance suites for this model ask of an endpoint, in cases of our own (Kimi-Vendor-Verifier's way).

Prompt tokens with images, parameters that must be refused or honoured, and tool calls by their schema, whole and streamed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from k26_plugins.operate.verify.conformance import counts, parameters, schemas
from k26_plugins.operate.verify.conformance.case import FAIL, NOT_ASKED, PASS, Case, Chat, Outcome, outcome_of
from k26_plugins.operate.verify.endpoint import Endpoint

__all__ = ["ANSWER_TOKENS", "CASES", "FAIL", "NOT_ASKED", "PASS", "Case", "Outcome", "check_conformance"]

CASES: tuple[Case, ...] = (*counts.cases(), *parameters.cases(), *schemas.cases())
ANSWER_TOKENS = 512
"""The limit of answers that shall end by themselves."""


def check_conformance(
    endpoint: Endpoint,
    on_case: Callable[[int], None] = lambda done: None,
    *,
    cases: Sequence[Case] = CASES,
    max_tokens: int = ANSWER_TOKENS,
) -> list[Outcome]:
    """Ask each case. Raises EndpointError where the endpoint answers no chat at all."""
    chat = Chat(endpoint, max_tokens)
    chat.find_switch()
    found = []
    for number, case in enumerate(cases, 1):
        found.append(outcome_of(case, chat))
        on_case(number)
    return found
