"""Send adversarial requests beside the swarm, and streams whose client hangs up in the middle of the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx
from httpx_sse import EventSource

from k26_plugins.operate.swarm.adversarial import AdversarialRequest, adversarial_requests
from k26_plugins.operate.swarm.client import Client
from k26_plugins.operate.swarm.scenario import merge_request

AT_ONCE = 4


@dataclass(frozen=True)
class Attack:
    """An adversarial request that was sent, and how the server answered it."""

    kind: str
    name: str
    outcome: str
    """The HTTP status, `timeout` or `connection`."""
    seconds: float
    """Seconds until the answer was complete or the request failed."""
    detail: str
    """The beginning of the refusal or the error's message; empty for status 200."""

    @property
    def held(self) -> bool:
        """Whether the server answered or refused the request, without an error of its own (5xx), as it should."""
        return self.outcome.isdecimal() and int(self.outcome) < 500


@dataclass
class Extras:
    """The adversarial requests and dropped streams of a run, which are spread evenly over the run's steps."""

    attacks: list[Attack] = field(default_factory=list)
    drops: int = 0
    """Number of streams that were dropped after their first piece."""
    undropped: list[str] = field(default_factory=list)
    """For each stream that ended before it could be dropped, why."""

    async def go(
        self,
        client: Client,
        prefix: list[dict[str, Any]],
        adversarial: int,
        drops: int,
        seed: int,
        done: Callable[[], float],
    ) -> None:
        """Send `adversarial` adversarial requests and drop `drops` streams, and return when all of them have ended.

        prefix: the messages with which a dropped stream's request begins. done: returns the share of the run's steps
        that are done, which decides when each request is sent.
        """
        work: list[Callable[[], Awaitable[None]]] = [
            partial(self._attack, client, request) for request in adversarial_requests(adversarial, client.model, seed)
        ]
        for number in range(drops):
            place = (number + 1) * len(work) // (drops + 1)
            work.insert(place, partial(self._drop, client, prefix, number))
        slots = asyncio.Semaphore(AT_ONCE)

        async def limited(job: Callable[[], Awaitable[None]]) -> None:
            async with slots:
                await job()

        running = []
        for number, job in enumerate(work):
            while done() < number / len(work):
                await asyncio.sleep(0.05)
            running.append(asyncio.create_task(limited(job)))
        await asyncio.gather(*running)

    async def _attack(self, client: Client, request: AdversarialRequest) -> None:
        began = client.now()
        detail = ""
        try:
            response = await client.http.post(
                f"{client.url}/v1/chat/completions",
                content=request.content,
                headers={"Content-Type": "application/json"},
            )
            outcome = str(response.status_code)
            detail = response.text[:300] if response.status_code != 200 else ""
        except httpx.TimeoutException:
            outcome = "timeout"
        except httpx.HTTPError as error:
            outcome, detail = "connection", str(error) or type(error).__name__
        self.attacks.append(Attack(request.kind, request.name, outcome, client.now() - began, detail))

    async def _drop(self, client: Client, prefix: list[dict[str, Any]], number: int) -> None:
        messages = [*prefix, merge_request([f"dropped {number}"])]
        body = {"model": client.model, "messages": messages, **client.body, "stream": True, "max_tokens": 512}
        try:
            async with client.http.stream("POST", f"{client.url}/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    self.undropped.append((await response.aread()).decode("utf-8", "replace")[:200])
                    return
                async for event in EventSource(response).aiter_sse():
                    if event.data == "[DONE]":
                        self.undropped.append(event.data)
                        return
                    if '"delta"' in event.data:
                        break
            self.drops += 1
        except httpx.HTTPError as error:
            self.undropped.append(str(error) or type(error).__name__)
