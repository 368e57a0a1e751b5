"""Whether every agent kept its own conversation: by secrets, by token accounting, and by asking again alone."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from k26_plugins.operate.swarm.client import Fingerprint, Step
from k26_plugins.operate.swarm.scenario import Agent
from k26_plugins.operate.verify.distance import kl_of_reported

_SECRET = re.compile(r"\b[a-z]+-\d{6}\b")


@dataclass(frozen=True)
class Fault:
    """A conversation that was lost or mixed up."""

    agent: int
    turn: int
    what: str


def wrong_secret(step: Step, agent: Agent, owners: dict[str, int], *, asked: bool) -> Fault | None:
    """Another agent's code word in the answer; and, where it was asked for, that the agent's own is not there."""
    said = set(_SECRET.findall(step.text))
    for secret in sorted(said & owners.keys() - {agent.secret}):
        return Fault(agent.number, step.turn, f"mixed: it says the code word of agent {owners[secret]}")
    if asked and agent.secret not in said:
        return Fault(agent.number, step.turn, "lost: it does not know its code word")
    return None


def wrong_count(step: Step, expected: Sequence[int], expected_digest: str) -> Fault | None:
    """The server's prompt against the core's, by number, and by token ids where the server reports them."""
    if step.prompt_tokens is None:
        return Fault(step.agent, step.turn, "lost: the server reports no usage")
    if step.prompt_tokens != len(expected):
        what = f"mixed: {step.prompt_tokens} prompt tokens, this conversation has {len(expected)}"
        return Fault(step.agent, step.turn, what)
    if step.prompt_digest is not None and step.prompt_digest != expected_digest:
        return Fault(step.agent, step.turn, "mixed: as many prompt tokens as this conversation has, and others")
    return None


def distance(first: Fingerprint, other: Fingerprint) -> float:
    """Mean KL over the answers' places, up to the first where they took different tokens: behind it contexts differ."""
    values = []
    for (token, listed), (other_token, other_listed) in zip(first, other, strict=False):
        value = kl_of_reported(listed, other_listed)
        values.append(FAR if math.isnan(value) else value)
        if token != other_token:
            break
    return sum(values) / len(values) if values else FAR


FAR = 10.0
"""Nats, where two places have no token in common."""


def mixed_answers(live: Sequence[Step], alone: Sequence[Step]) -> list[Fault]:
    """Answers that were given under load and are not those of their conversations when asked again alone.

    Rounding moves log-probabilities with the batch, so there is no fixed bound: an answer must be nearer to its own
    conversation's than to any other's, and nearer than other conversations are to each other.
    """
    if len(alone) < 3:
        return []
    between = [
        distance(one.fingerprint, other.fingerprint)
        for number, one in enumerate(alone)
        for other in alone[number + 1 :]
        if one.agent != other.agent
    ]
    typical = median(between) if between else 0.0
    faults = []
    for number, step in enumerate(live):
        own = distance(step.fingerprint, alone[number].fingerprint)
        others = [
            (distance(step.fingerprint, other.fingerprint), other.agent) for other in alone if other.agent != step.agent
        ]
        nearest, owner = min(others, default=(math.inf, -1))
        if own > nearest:
            faults.append(Fault(step.agent, step.turn, f"mixed: the answer is nearer to agent {owner}'s"))
        elif own > typical / 2:
            faults.append(
                Fault(step.agent, step.turn, "mixed: asked again alone, the conversation is answered otherwise")
            )
    return faults
