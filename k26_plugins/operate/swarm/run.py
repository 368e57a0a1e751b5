"""Run the swarm: the orchestrator splits the task, the agents work side by side, and the orchestrator merges."""

from __future__ import annotations

import asyncio
import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from k26_plugins.operate.swarm import scenario, tools
from k26_plugins.operate.swarm.client import OK, Client, Step
from k26_plugins.operate.swarm.extras import Extras
from k26_plugins.operate.swarm.memory import Sample, resident_bytes
from k26_plugins.operate.swarm.metrics import PrefixCache, read_prefix_cache
from k26_plugins.operate.swarm.pace import Pace
from k26_plugins.operate.swarm.scenario import Agent, Shape

MEMORY_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Load:
    """How the traffic is sent."""

    concurrency: int | None = None
    """Largest number of requests at once; None for the number of agents."""
    rate: float | None = None
    """Arrivals per second, for an open loop in place of a fixed concurrency."""
    tool_latency: float = 0.2
    """Mean seconds that a tool takes."""
    thinking: bool = False
    timeout: float = 600.0
    """Seconds without a byte after which a request counts as unanswered."""
    replays: int = 40
    """Number of steps that are sent again alone at the end."""
    pid: int | None = None
    """The server's process, whose memory is sampled; None for no sampling."""
    drops: int = 0
    """Number of streams that are dropped in the middle of the answer."""
    adversarial: int = 0
    """Number of adversarial requests."""


@dataclass
class Conversation:
    """The messages to and from one agent.

    Messages are only ever appended, so that each earlier request can be built again from the first of them.
    """

    agent: Agent | None
    """None for the orchestrator."""
    messages: list[dict[str, Any]]
    asked: list[tuple[Step, int]] = field(default_factory=list)
    """Each step, with the number of messages that its request had."""
    result: str = ""
    """The text of the last answer."""


@dataclass
class Run:
    """The record of a run."""

    shape: Shape
    load: Load
    conversations: list[Conversation]
    seconds: float = 0.0
    cache_before: PrefixCache | None = None
    cache_after: PrefixCache | None = None
    memory: list[Sample] = field(default_factory=list)
    replayed: list[tuple[Step, Step]] = field(default_factory=list)
    """Each step that was sent again, with the step of the same request sent alone."""
    extras: Extras = field(default_factory=Extras)
    tool_calls: int = 0
    """Number of the model's own tool calls that were carried out; all other calls are scripted."""
    malformed_calls: int = 0
    """Number of the model's own tool calls that could not be carried out."""

    @property
    def steps(self) -> list[Step]:
        """All steps of all conversations, without those that were sent again alone."""
        return [step for conversation in self.conversations for step, _ in conversation.asked]


class Swarm:
    """The sender of one run's traffic; `go` runs it."""

    def __init__(
        self,
        url: str,
        model: str,
        http: httpx.AsyncClient,
        shape: Shape,
        load: Load,
        *,
        prefix: list[dict[str, Any]],
        extra_body: dict[str, Any],
        on_step: Callable[[Step], None] = lambda step: None,
    ) -> None:
        """Prepare a run against the server at `url`.

        prefix: the messages with which every conversation begins. extra_body: fields of each request that are the
        engine's own, such as one that makes it report the prompt's token ids. on_step: called after each step. Raises
        ShapeError if there are too few steps for the agents.
        """
        self.agents = scenario.make_agents(shape)
        self.prefix = prefix
        self.shape, self.load, self.on_step = shape, load, on_step
        body = {"tools": tools.TOOLS, "temperature": 0, "max_tokens": shape.answer_tokens, **extra_body}
        if not load.thinking:
            body["chat_template_kwargs"] = {"thinking": False}
        self.client = Client(http, url, model, body)
        rng = random.Random(f"replays {shape.seed}")
        places = [(agent.number, turn) for agent in self.agents for turn in range(agent.turns)]
        self._kept = set(rng.sample(places, min(load.replays, len(places))))
        self.pace = Pace(load.concurrency or shape.agents, load.rate, shape.seed)
        self.run = Run(shape, load, [])
        self._done = 0

    async def can_repeat(self) -> bool:
        """Return whether the model, asked for a code word that it was just told, says it.

        Raises ConnectionError if the request fails.
        """
        messages = [
            {"role": "user", "content": "The code word is harbour-481516. Say the code word, and nothing else."}
        ]
        step = await self.client.send(Step(scenario.ORCHESTRATOR, 0, "probe"), messages)
        if step.outcome != OK:
            raise ConnectionError(f"a first request ends with {step.outcome}: {step.detail}")
        return "harbour-481516" in step.text

    async def go(self) -> Run:
        """Send all traffic, then send some steps again alone, and return the record of the run."""
        run, client = self.run, self.client
        run.cache_before = await read_prefix_cache(client.http, client.url)
        client.began += client.now()
        sampling = asyncio.create_task(self._sample_memory())
        extras = asyncio.create_task(
            run.extras.go(
                client, self.prefix, self.load.adversarial, self.load.drops, self.shape.seed, self._share_done
            )
        )
        await self._ask(self._orchestrator(scenario.split_request(self.shape)), 0, "split")
        working = [asyncio.create_task(self._work(agent)) for agent in self.agents]
        results = await asyncio.gather(*working)
        await self._merge(list(results))
        run.seconds, self._done = client.now(), self.shape.steps
        await extras
        sampling.cancel()
        run.cache_after = await read_prefix_cache(client.http, client.url)
        await self._replay()
        return run

    def _share_done(self) -> float:
        return self._done / self.shape.steps

    def _orchestrator(self, request: dict[str, Any]) -> Conversation:
        conversation = Conversation(None, [*self.prefix, request])
        self.run.conversations.append(conversation)
        return conversation

    async def _ask(self, conversation: Conversation, turn: int, kind: str) -> Step:
        agent = scenario.ORCHESTRATOR if conversation.agent is None else conversation.agent.number
        step = Step(agent, turn, kind)
        conversation.asked.append((step, len(conversation.messages)))
        async with self.pace.turn() as late:
            step.late = late
            await self.client.send(step, conversation.messages, fingerprint=(agent, turn) in self._kept)
        conversation.result = step.content or step.reasoning
        self._done += 1
        self.on_step(step)
        return step

    async def _work(self, agent: Agent) -> str:
        """Take one agent through its turns and return its last answer.

        The agent stops after a failed turn, because a conversation that lacks an answer is another conversation.
        """
        rng = random.Random(f"agent {self.shape.seed} {agent.number}")
        conversation = Conversation(agent, [*self.prefix, scenario.opening(agent, self.shape)])
        self.run.conversations.append(conversation)
        for turn in range(agent.turns):
            step = await self._ask(conversation, turn, "agent")
            if step.outcome != OK:
                break
            last = turn + 2 == agent.turns
            if turn + 1 < agent.turns:
                await self._go_on(conversation, step, rng, last=last)
        return conversation.result

    async def _go_on(self, conversation: Conversation, step: Step, rng: random.Random, *, last: bool) -> None:
        """Append the answer to the conversation, then its tool calls' results.

        A user message that asks to go on follows if there are no calls, or if the next turn is the last.
        """
        calls = self._calls(step, rng)
        message: dict[str, Any] = {"role": "assistant", "content": step.content}
        if step.reasoning:
            message["reasoning_content"] = step.reasoning
        if calls:
            message["tool_calls"] = calls
        conversation.messages.append(message)
        waits = [tools.latency(self.load.tool_latency, rng) for _ in calls]
        await asyncio.sleep(max(waits, default=0.0))
        for call in calls:
            content = tools.answer(call["function"]["name"], call["function"]["arguments"])
            conversation.messages.append({"role": "tool", "tool_call_id": call["id"], "content": content})
        if last or not calls:
            conversation.messages.append(scenario.follow_up(step.turn + 1, last=last))

    def _calls(self, step: Step, rng: random.Random) -> list[dict[str, Any]]:
        """Return the model's own tool calls that can be carried out.

        If there are none, return a scripted call in 80 % of the cases and no call in the others.
        """
        own = []
        for call in copy.deepcopy(step.calls):
            function = call["function"]
            if call["id"] and tools.fault_of(function["name"], function["arguments"]) is None:
                own.append(call)
            else:
                self.run.malformed_calls += 1
        self.run.tool_calls += len(own)
        name = rng.choice(sorted(tools.SCHEMAS))
        arguments = tools.scripted_arguments(name, rng)
        talk_only = rng.random() < 0.2
        if own or talk_only:
            return own
        call_id = f"functions.{name}:{step.turn}"
        return [tools.call(call_id, name, arguments)]

    async def _merge(self, results: list[str]) -> None:
        """Have the orchestrator merge results in groups, level by level, until one result is left."""
        size, turn = self.shape.results_per_merge, 1
        for count in self.shape.merges():
            groups = [results[size * number : size * (number + 1)] for number in range(count)]
            asked = [self._orchestrator(scenario.merge_request(group)) for group in groups]
            numbers = range(turn, turn + count)
            turn += count
            await asyncio.gather(
                *(self._ask(conversation, number, "merge") for conversation, number in zip(asked, numbers, strict=True))
            )
            results = [conversation.result for conversation in asked]

    async def _replay(self) -> None:
        """Send the steps that were chosen for it again, one at a time, so that nothing else loads the server."""
        for conversation in self.run.conversations:
            for step, length in conversation.asked:
                if (step.agent, step.turn) in self._kept and step.kind == "agent" and step.outcome == OK:
                    again = Step(step.agent, step.turn, "replay")
                    await self.client.send(again, conversation.messages[:length], fingerprint=True)
                    self.run.replayed.append((step, again))

    async def _sample_memory(self) -> None:
        while self.load.pid is not None:
            size = await asyncio.to_thread(resident_bytes, self.load.pid)
            self.run.memory.append((self.client.now(), size))
            await asyncio.sleep(MEMORY_SECONDS)
