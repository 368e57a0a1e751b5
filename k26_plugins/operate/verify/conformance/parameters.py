"""Cases about parameters: values that must be refused, Moonshot's fixed values, and values that must be honoured.

Moonshot's API takes one value of temperature, top_p, n and the penalties in each mode and refuses all others; open
engines sample as the request says. Both are right. Taking a value and ignoring it is wrong.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import jsonschema

from k26_plugins.operate.verify.conformance.case import QUESTION, Case, Chat, NotAskedError, NotHeldError, require, said
from k26_plugins.operate.verify.endpoint import EndpointError
from k26_plugins.operate.verify.tools import WEATHER

REFUSED: dict[str, dict[str, Any]] = {
    "temperature below zero": {"temperature": -0.1},
    "top_p above one": {"top_p": 1.5},
    "top_p below zero": {"top_p": -0.5},
    "presence_penalty of 3": {"presence_penalty": 3},
    "frequency_penalty of -3": {"frequency_penalty": -3},
    "max_tokens below zero": {"max_tokens": -1},
    "max_tokens as words": {"max_tokens": "many"},
    "tool_choice required without tools": {"tool_choice": "required"},
    "tool_choice of a tool that is not offered": {
        "tools": [WEATHER],
        "tool_choice": {"type": "function", "function": {"name": "fly"}},
    },
}
FIXED = {"top_p": 0.95, "n": 1, "presence_penalty": 0, "frequency_penalty": 0}
THINKING_TEMPERATURE, INSTANT_TEMPERATURE = 1.0, 0.6
COUNT = "Count from 1 to 1000, in words."
STORY = "Write the first line of a story that nobody has written yet."
SAMPLES = 4
SCHEMA = {
    "type": "object",
    "properties": {"answer": {"enum": ["yes", "no"]}},
    "required": ["answer"],
    "additionalProperties": False,
}


def _refused(chat: Chat, body: dict[str, Any]) -> str:
    try:
        chat.ask(QUESTION, **{"max_tokens": 1, **body})
    except EndpointError as error:
        require(error.is_refusal, f"it must be refused, not {error}")
        return f"refused with {error.status}"
    raise NotHeldError("it was taken, and must be refused")


def _usual_values(chat: Chat, thinking: bool) -> str:
    body = {**FIXED, "temperature": THINKING_TEMPERATURE if thinking else INSTANT_TEMPERATURE, "max_tokens": 1}
    if thinking:
        chat = Chat(chat.endpoint, chat.max_tokens)
    chat.ask(QUESTION, **body)
    return "taken"


def _fixed(chat: Chat, content: str, **body: Any) -> list[str] | None:
    """Return the texts of the choices; None if the endpoint refuses the value, as Moonshot's API does."""
    try:
        return [said(choice) for choice in chat.ask(content, **body)["choices"]]
    except EndpointError as error:
        if error.is_refusal:
            return None
        raise


REFUSED_AS_FIXED = "refused, as in Moonshot's API"


def _n(chat: Chat) -> str:
    found = _fixed(chat, STORY, n=2, max_tokens=4, temperature=1)
    require(found is None or len(found) == 2, f"{len(found or [])} choices, asked for 2")
    return REFUSED_AS_FIXED if found is None else "two choices"


def _temperature(chat: Chat) -> str:
    greedy = _fixed(chat, STORY, temperature=0, max_tokens=12)
    if greedy is None:
        return REFUSED_AS_FIXED
    hot = [_fixed(chat, STORY, temperature=1.8, top_p=1, max_tokens=12, seed=seed) for seed in range(SAMPLES)]
    require(any(one != greedy for one in hot), f"{SAMPLES} answers at temperature 1.8 are those at 0")
    return "sampled"


def _top_p(chat: Chat) -> str:
    """Check that a tiny top_p, which leaves only the likeliest token of the distribution, samples this token."""
    greedy = _fixed(chat, STORY, temperature=0, max_tokens=1)
    if greedy is None:
        return REFUSED_AS_FIXED
    for seed in range(SAMPLES):
        found = _fixed(chat, STORY, temperature=1, top_p=1e-4, max_tokens=1, seed=seed)
        if found is None:
            return REFUSED_AS_FIXED
        require(found == greedy, f"at top_p 0.0001 it says {found[0]!r}, and the likeliest token is {greedy[0]!r}")
    return "the likeliest token"


def _penalty(chat: Chat, name: str) -> str:
    without, with_it = (_fixed(chat, COUNT, temperature=0, max_tokens=32, **{name: value}) for value in (0, 2))
    if with_it is None:
        return REFUSED_AS_FIXED
    if with_it == without:
        raise NotAskedError("the greedy answer is the same: it may have nothing to penalize")
    return "another answer"


def _limit(chat: Chat, name: str) -> str:
    answer = chat.ask(COUNT, temperature=0, **{name: 5})
    reason, count = answer["choices"][0]["finish_reason"], int(answer["usage"]["completion_tokens"])
    require((reason, count) == ("length", 5), f"{count} tokens and stop reason {reason!r}, expected 5 and 'length'")
    return "5 tokens"


def _stop(chat: Chat) -> str:
    whole = said(chat.ask(COUNT, temperature=0, max_tokens=32)["choices"][0])
    place = next(
        (at for at in range(len(whole) // 4, len(whole)) if whole[at].isascii() and whole[at].isprintable()), None
    )
    if place is None:
        raise NotAskedError("the answer holds no plain character to stop at")
    choice = chat.ask(COUNT, temperature=0, max_tokens=32, stop=[whole[place]])["choices"][0]
    found, reason = said(choice), choice["finish_reason"]
    require(whole[place] not in found, f"the answer holds the stop string {whole[place]!r}: {found!r}")
    expected = whole[: whole.index(whole[place])]
    require(found != expected or reason == "stop", f"it ended at the stop string for {reason!r}, expected 'stop'")
    return repr(whole[place])


def _seed(chat: Chat) -> str:
    first, second = (_fixed(chat, STORY, temperature=1, max_tokens=12, seed=7) for _ in range(2))
    if first != second:
        raise NotAskedError("one seed gave two answers: engines promise the same only where they run deterministically")
    return "the same answer twice"


def _logprobs(chat: Chat) -> str:
    answer = chat.ask(COUNT, temperature=0, max_tokens=4, logprobs=True, top_logprobs=3)
    entries = (answer["choices"][0].get("logprobs") or {}).get("content") or []
    count = int(answer["usage"]["completion_tokens"])
    require(len(entries) == count, f"{len(entries)} entries for {count} tokens")
    for entry in entries:
        top = [float(item["logprob"]) for item in entry["top_logprobs"]]
        require(len(top) >= 3, f"{len(top)} alternatives, asked for 3")
        require(max(top) <= 1e-3, f"a log-probability of {max(top)}")
        # The answer is greedy, so no token may be likelier than the chosen one.
        require(float(entry["logprob"]) >= max(top) - 1e-3, f"{entry['token']!r} was chosen and is not the likeliest")
    return f"{count} tokens"


def _json(chat: Chat, response_format: dict[str, Any], schema: dict[str, Any]) -> str:
    question = 'Is water wet? Answer as JSON: {"answer": "yes"} or {"answer": "no"}.'
    choice = chat.ask(question, temperature=0, max_tokens=chat.max_tokens, response_format=response_format)["choices"][
        0
    ]
    if choice["finish_reason"] == "length":
        raise NotAskedError(f"the answer did not end within {chat.max_tokens} tokens")
    content = choice["message"].get("content") or ""
    try:
        jsonschema.validate(json.loads(content), schema)
    except (json.JSONDecodeError, jsonschema.ValidationError) as error:
        raise NotHeldError(f"the content {content[:200]!r}: {str(error).splitlines()[0]}") from error
    return content


def _no_tools(chat: Chat) -> str:
    question = "What is the weather in Paris?"
    body = {"tools": [WEATHER], "tool_choice": "none", "temperature": 0, "max_tokens": chat.max_tokens}
    choice = chat.ask(question, **body)["choices"][0]
    calls = choice["message"].get("tool_calls") or []
    require(not calls and choice["finish_reason"] != "tool_calls", f"{len(calls)} calls, and none was allowed")
    return "no call"


def cases() -> list[Case]:
    """Return the cases about parameters."""
    by_schema = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
    return [
        *(Case(f"refuses {name}", partial(_refused, body=body)) for name, body in REFUSED.items()),
        Case("takes the usual values, thinking", partial(_usual_values, thinking=True)),
        Case("takes the usual values, instant", partial(_usual_values, thinking=False)),
        Case("n", _n),
        Case("temperature", _temperature),
        Case("top_p", _top_p),
        *(Case(name, partial(_penalty, name=name)) for name in ("presence_penalty", "frequency_penalty")),
        *(Case(name, partial(_limit, name=name)) for name in ("max_tokens", "max_completion_tokens")),
        Case("stop", _stop),
        Case("seed", _seed),
        Case("logprobs", _logprobs),
        Case(
            "response_format json_object",
            partial(_json, response_format={"type": "json_object"}, schema={"type": "object"}),
        ),
        Case("response_format json_schema", partial(_json, response_format=by_schema, schema=SCHEMA)),
        Case("tool_choice none", _no_tools),
    ]
