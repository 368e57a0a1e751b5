"""Whether every agent kept its own conversation: by secrets, by token accounting, and by asking again alone."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, median_low

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
    """KL in the median of the answers' places, up to the first where they took different tokens: behind it contexts differ.

    Where two experts are all but level, another batch's rounding chooses the other one, and one place is then as far off as
    another conversation is. An answer to another conversation is off at all places.
    """
    values = []
    for (token, listed), (other_token, other_listed) in zip(first, other, strict=False):
        value = kl_of_reported(listed, other_listed)
        values.append(FAR if math.isnan(value) else value)
        if token != other_token:
            break
    return median_low(values) if values else FAR


FAR = 10.0
"""Nats, where two places have no token in common."""


@dataclass(frozen=True)
class Comparison:
    """An answer under load, held against its conversation's and the others' when they were asked again alone."""

    agent: int
    turn: int
    own: float
    """Nats, as `distance` has it."""
    nearest: float
    nearest_agent: int
    """The other agent whose answer is nearest."""
    same_text: bool


@dataclass(frozen=True)
class Comparisons:
    rows: list[Comparison]
    typical: float
    """The median distance between the conversations of two agents."""

    def faults(self) -> list[Fault]:
        """Answers that are not their conversation's.

        Rounding moves log-probabilities with the batch, and some conversations are answered alike, so no fixed bound is
        right: an answer is another's where it is as far from its own conversation as conversations are from each other,
        or where it is a good part of that away and nearer to another's.
        """
        found = []
        for row in self.rows:
            if row.own > self.typical / 4 and row.own > row.nearest:
                found.append(Fault(row.agent, row.turn, f"mixed: the answer is nearer to agent {row.nearest_agent}'s"))
            elif row.own > self.typical / 2:
                what = "mixed: asked again alone, the conversation is answered otherwise"
                found.append(Fault(row.agent, row.turn, what))
        return found


def compare_alone(live: Sequence[Step], alone: Sequence[Step]) -> Comparisons:
    """Each step under load against all that were asked again alone, its own among them, in the same order."""
    between = [
        distance(one.fingerprint, other.fingerprint)
        for number, one in enumerate(alone)
        for other in alone[number + 1 :]
        if one.agent != other.agent
    ]
    rows = []
    for step, again in zip(live, alone, strict=True):
        others = (
            (distance(step.fingerprint, other.fingerprint), other.agent) for other in alone if other.agent != step.agent
        )
        nearest, owner = min(others, default=(math.inf, step.agent))
        own = distance(step.fingerprint, again.fingerprint)
        rows.append(Comparison(step.agent, step.turn, own, nearest, owner, step.text == again.text))
    return Comparisons(rows, median(between) if between else FAR)
