"""Runs an agent of pydantic-ai, in the clients' environment: it asks, calls its tools, and prints what it received.

The output is one line of JSON: the answer, the calls of the tools, and the reasoning.

python pydantic_agent.py URL MODEL PICTURE whole|streamed
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_ai import Agent, BinaryContent, ModelRetry, NativeOutput
from pydantic_ai.messages import ThinkingPart
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

called: list[tuple[str, dict[str, Any]]] = []
url, model, picture, how = sys.argv[1:]


class Report(BaseModel):
    city: str
    warm: bool


def get_weather(city: str) -> str:
    called.append(("get_weather", {"city": city}))
    return "22 °C, 晴"


def now() -> BinaryContent:
    called.append(("now", {}))
    if len(called) == 2:
        raise ModelRetry("the clock does not answer")
    return BinaryContent(Path(picture).read_bytes(), media_type="image/png")


async def drain(context: Any, events: AsyncIterable[Any]) -> None:
    async for _ in events:
        pass


async def main() -> None:
    provider = OpenAIProvider(base_url=url, api_key="none")
    agent = Agent(
        OpenAIChatModel(model, provider=provider), output_type=NativeOutput(Report), tools=[get_weather, now], retries=2
    )
    result = await agent.run(
        "Is it warm in 北京?",
        model_settings={"max_tokens": 500},
        event_stream_handler=drain if how == "streamed" else None,
    )
    thoughts = [part.content for one in result.all_messages() for part in one.parts if isinstance(part, ThinkingPart)]
    print(json.dumps({"output": result.output.model_dump(), "called": called, "thoughts": thoughts}))


asyncio.run(main())
