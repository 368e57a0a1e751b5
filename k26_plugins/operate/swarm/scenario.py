"""Make the agents of the swarm and their messages. Everything follows from the seed."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image

ORCHESTRATOR = -1
"""The orchestrator's number, where a step names its agent."""

_LEXICON = (
    "river gauge station level water north valley bridge winter flood record sensor valid spring report basin lower upper"
    " stream morning reading drift repair annual change slope forest harbour tide rain storm average channel depth mark"
)
_WORDS = tuple(_LEXICON.split(" "))
_SYSTEM = (
    "You are one of many agents who work on the same records. Use the tools, keep to your own part, and answer in "
    "one or two sentences. Never repeat another agent's code word."
)


class ShapeError(ValueError):
    """The error for a swarm with too few steps. The message has the numbers and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The size of the traffic."""

    agents: int = 300
    steps: int = 4000
    """Number of requests in all, including the orchestrator's."""
    prefix_tokens: int = 4000
    """Tokens of the records that are in the system message of every request, in addition to its instructions and the
    tools."""
    answer_tokens: int = 48
    """Largest number of tokens of an answer."""
    images: float = 0.1
    """The share of agents whose task comes with an image."""
    results_per_merge: int = 20
    """Largest number of results that one request merges."""
    seed: int = 0

    def merges(self) -> list[int]:
        """Return the number of requests at each level of the merge; the last level has one request."""
        levels: list[int] = []
        left = self.agents
        while not levels or left > 1:
            left = -(-left // self.results_per_merge)
            levels.append(left)
        return levels

    def turns(self) -> list[int]:
        """Return the number of requests of each agent. Raises ShapeError if an agent would have none."""
        left = self.steps - 1 - sum(self.merges())
        if left < self.agents:
            need = self.agents + 1 + sum(self.merges())
            raise ShapeError(
                f"{self.steps} steps are too few for {self.agents} agents, who need {need} with the orchestrator's: "
                f"give more --steps or fewer --agents."
            )
        each, more = divmod(left, self.agents)
        return [each + (number < more) for number in range(self.agents)]


@dataclass(frozen=True)
class Agent:
    """A sub-agent of the swarm."""

    number: int
    secret: str
    """The agent's code word, which no other agent has."""
    turns: int
    """Number of requests."""
    image: bytes | None
    """The PNG that comes with the agent's task, None for a task without an image."""


def make_agents(shape: Shape) -> list[Agent]:
    """Return the sub-agents. Raises ShapeError if there are too few steps for them."""
    rng = random.Random(f"agents {shape.seed}")
    secrets = rng.sample(range(100_000, 1_000_000), shape.agents)
    with_image = set(rng.sample(range(shape.agents), round(shape.images * shape.agents)))
    return [
        Agent(
            number,
            f"{rng.choice(_WORDS)}-{secrets[number]}",
            turns,
            _image(f"{shape.seed} {number}") if number in with_image else None,
        )
        for number, turns in enumerate(shape.turns())
    ]


def shared_prefix(shape: Shape, count_tokens: Callable[[str], int]) -> list[dict[str, Any]]:
    """Return the messages with which every conversation begins: one system message.

    It has about `prefix_tokens` tokens of records. count_tokens: returns the number of tokens of a text.
    """
    rng = random.Random(f"prefix {shape.seed}")
    lines: list[str] = []
    tokens = 0
    while tokens < shape.prefix_tokens:
        words = " ".join(rng.choice(_WORDS) for _ in range(12))
        lines.append(f"Record {len(lines)}: {words}, {rng.randrange(900)} cm.")
        tokens += count_tokens(lines[-1] + "\n")
    return [{"role": "system", "content": f"{_SYSTEM}\n\n" + "\n".join(lines)}]


def split_request(shape: Shape) -> dict[str, Any]:
    """Return the user message that asks the orchestrator to split the task."""
    text = f"Split the survey of these records into {shape.agents} parts of equal size. Name the first and the last."
    return {"role": "user", "content": text}


def merge_request(results: list[str]) -> dict[str, Any]:
    """Return the user message that asks the orchestrator to merge these results."""
    listed = "\n".join(f"{number}. {result}" for number, result in enumerate(results, 1))
    return {"role": "user", "content": f"Merge these {len(results)} results into one sentence.\n{listed}"}


def opening(agent: Agent, shape: Shape) -> dict[str, Any]:
    """Return the user message with an agent's task, its code word and its image."""
    text = (
        f"You are agent {agent.number} of {shape.agents}. Your code word is {agent.secret}; end every answer with it. "
        f"Survey part {agent.number} of the records in {agent.turns} steps."
    )
    if agent.image is None:
        return {"role": "user", "content": text}
    url = f"data:image/png;base64,{base64.b64encode(agent.image).decode()}"
    return {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": f"{text} The image is its map."},
        ],
    }


def follow_up(turn: int, *, last: bool) -> dict[str, Any]:
    """Return the user message that asks for the next turn; the last one asks for the result and the code word."""
    text = "Report your result, and say your code word." if last else f"Go on with step {turn}."
    return {"role": "user", "content": text}


def _image(seed: str) -> bytes:
    rng = random.Random(f"image {seed}")
    width, height = rng.randint(40, 160), rng.randint(40, 120)
    buffer = io.BytesIO()
    Image.frombytes("RGB", (width, height), rng.randbytes(3 * width * height)).save(buffer, "PNG")
    return buffer.getvalue()
