"""Check that the server kept every agent's conversation apart from the others.

There are three checks: each agent repeats its own secret code word, the server's prompt has the tokens that the core
counts, and the same request sent again without other traffic gets the same answer.
"""

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
    """A sign that the server lost a conversation or mixed it up with another."""

    agent: int
    turn: int
    what: str


def wrong_secret(step: Step, agent: Agent, owners: dict[str, int], *, asked: bool) -> Fault | None:
    """Return a fault if the answer has another agent's code word, or lacks the agent's own although it was asked for.

    owners: each agent's number by its code word. asked: whether this step asked for the code word.
    """
    said = set(_SECRET.findall(step.text))
    for secret in sorted(said & owners.keys() - {agent.secret}):
        return Fault(agent.number, step.turn, f"mixed: it says the code word of agent {owners[secret]}")
    if asked and agent.secret not in said:
        return Fault(agent.number, step.turn, "lost: it does not know its code word")
    return None


def wrong_count(step: Step, expected: Sequence[int], expected_digest: str) -> Fault | None:
    """Return a fault if the server's prompt has another number of tokens than the core's, or other token ids.

    expected: the core's token ids, of which `expected_digest` is the digest. Token ids are compared only if the server
    reports them.
    """
    if step.prompt_tokens is None:
        return Fault(step.agent, step.turn, "lost: the server reports no usage")
    if step.prompt_tokens != len(expected):
        what = f"mixed: {step.prompt_tokens} prompt tokens, this conversation has {len(expected)}"
        return Fault(step.agent, step.turn, what)
    if step.prompt_digest is not None and step.prompt_digest != expected_digest:
        return Fault(step.agent, step.turn, "mixed: as many prompt tokens as this conversation has, and others")
    return None


def distance(first: Fingerprint, other: Fingerprint) -> float:
    """Return the median KL divergence, in nats, between the distributions at the positions of two answers.

    Positions count up to the first with different tokens, because the contexts differ after it. The median is taken
    because the rounding of another batch may choose another expert where two are almost equal, and a single position is
    then as far off as in another conversation. An answer to another conversation is far off at every position.
    """
    values = []
    for (token, listed), (other_token, other_listed) in zip(first, other, strict=False):
        value = kl_of_reported(listed, other_listed)
        values.append(FAR if math.isnan(value) else value)
        if token != other_token:
            break
    return median_low(values) if values else FAR


FAR = 10.0
"""The distance in nats of two positions that report no token in common, and of answers without log-probabilities."""


@dataclass(frozen=True)
class Comparison:
    """An answer under load, compared with the answers that its own and the other conversations got without load."""

    agent: int
    turn: int
    own: float
    """The distance in nats to the answer that the same request got without load."""
    nearest: float
    """The smallest distance in nats to an answer that another agent got without load; infinite if there is none."""
    nearest_agent: int
    """The other agent with that answer."""
    same_text: bool
    """Whether the answers with and without load are the same word for word."""


@dataclass(frozen=True)
class Comparisons:
    """All comparisons of a run."""

    rows: list[Comparison]
    typical: float
    """The median distance in nats between the answers that two different agents got without load."""

    def faults(self) -> list[Fault]:
        """Return a fault for each answer that does not belong to its conversation.

        No fixed bound is right, because rounding changes log-probabilities with the batch and some conversations have
        similar answers. An answer is a fault if its distance to its own conversation is more than half of the typical
        distance between conversations, or more than a quarter of it and larger than the distance to another agent's
        answer.
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
    """Compare each step under load with all steps that were sent again alone.

    live: steps under load. alone: the same requests sent again alone, in the same order.
    """
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
