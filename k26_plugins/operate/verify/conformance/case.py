"""What a case of conformance is, and how it asks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from k26_plugins.operate.verify.endpoint import Endpoint, EndpointError

PASS, FAIL, NOT_ASKED = "pass", "fail", "not asked"
# How a request says that the model shall not think: open engines' way, and that of Moonshot's API.
SWITCHES: tuple[dict[str, Any], ...] = (
    {"chat_template_kwargs": {"thinking": False}},
    {"thinking": {"type": "disabled"}},
)
QUESTION = "Say OK and nothing else."


class NotHeldError(Exception):
    """The endpoint did something else than it must. The message says what."""


class NotAskedError(Exception):
    """The case cannot be decided on this endpoint. The message says why."""


@dataclass(slots=True)
class Chat:
    """An endpoint that is asked without thinking, where it can be."""

    endpoint: Endpoint
    max_tokens: int
    """The limit of answers that shall end by themselves."""
    off: dict[str, Any] = field(default_factory=dict)
    """The fields that switch thinking off; empty where none does."""

    def ask(self, content: Any, **body: Any) -> dict[str, Any]:
        """A whole chat completion. Raises EndpointError."""
        return self.endpoint.chat([{"role": "user", "content": content}], **self.off, **body)

    def streamed(self, content: Any, **body: Any) -> dict[str, Any]:
        """The first choice of a stream, put together. Raises EndpointError."""
        return self.endpoint.streamed_chat([{"role": "user", "content": content}], **self.off, **body)

    def prompt_tokens(self, content: Any, **body: Any) -> int:
        return int(self.ask(content, max_tokens=1, **body)["usage"]["prompt_tokens"])

    def find_switch(self) -> None:
        """Take the first way of SWITCHES that changes the prompt by the one token that closes the thinking."""
        thinking = self.prompt_tokens(QUESTION)
        for fields in SWITCHES:
            try:
                if self.prompt_tokens(QUESTION, **fields) == thinking + 1:
                    self.off = fields
                    return
            except EndpointError:
                continue


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    ask: Callable[[Chat], str]
    """Returns what was seen. Raises NotHeldError, NotAskedError or EndpointError."""


@dataclass(frozen=True, slots=True)
class Outcome:
    name: str
    verdict: str
    """PASS, FAIL or NOT_ASKED."""
    detail: str


def outcome_of(case: Case, chat: Chat) -> Outcome:
    try:
        return Outcome(case.name, PASS, case.ask(chat))
    except NotAskedError as reason:
        return Outcome(case.name, NOT_ASKED, str(reason))
    except (NotHeldError, EndpointError) as error:
        return Outcome(case.name, FAIL, str(error))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        return Outcome(case.name, FAIL, f"the answer is no chat completion: {type(error).__name__} {error}")


def require(holds: bool, message: str) -> None:
    if not holds:
        raise NotHeldError(message)


def said(choice: dict[str, Any]) -> str:
    """Thoughts and answer of a choice."""
    message = choice["message"]
    names = ("reasoning_content", "content") if message.get("reasoning_content") else ("reasoning", "content")
    return "".join(message.get(name) or "" for name in names)
