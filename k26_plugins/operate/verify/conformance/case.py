"""A case of conformance: its question to an endpoint, and its outcome."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from k26_plugins.operate.verify.endpoint import Endpoint, EndpointError

PASS, FAIL, NOT_ASKED = "pass", "fail", "not asked"
# Fields of a request that switch thinking off: those of open engines, and those of Moonshot's API.
SWITCHES: tuple[dict[str, Any], ...] = (
    {"chat_template_kwargs": {"thinking": False}},
    {"thinking": {"type": "disabled"}},
)
QUESTION = "Say OK and nothing else."


class NotHeldError(Exception):
    """Raised if the endpoint does something other than it must. The message says what it did."""


class NotAskedError(Exception):
    """Raised if a case cannot be decided on this endpoint. The message says why."""


@dataclass(slots=True)
class Chat:
    """An endpoint that is asked with thinking switched off, if it can be switched off there."""

    endpoint: Endpoint
    max_tokens: int
    """The token limit of answers that are expected to end by themselves."""
    off: dict[str, Any] = field(default_factory=dict)
    """Fields of a request that switch thinking off; empty if no such fields are known for this endpoint."""

    def ask(self, content: Any, **body: Any) -> dict[str, Any]:
        """Return the whole chat completion that answers a user's message. Raises EndpointError."""
        return self.endpoint.chat([{"role": "user", "content": content}], **self.off, **body)

    def streamed(self, content: Any, **body: Any) -> dict[str, Any]:
        """Return the choice of a streamed chat, put together from its chunks. Raises EndpointError."""
        return self.endpoint.streamed_chat([{"role": "user", "content": content}], **self.off, **body)

    def prompt_tokens(self, content: Any, **body: Any) -> int:
        """Return how many prompt tokens the endpoint counts for a user's message. Raises EndpointError."""
        return int(self.ask(content, max_tokens=1, **body)["usage"]["prompt_tokens"])

    def find_switch(self) -> None:
        """Set `off` to the first of SWITCHES that adds one token to the prompt: the token that closes the thinking."""
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
    """A question to an endpoint that decides one thing."""

    name: str
    ask: Callable[[Chat], str]
    """Returns in words what was seen. Raises NotHeldError, NotAskedError or EndpointError."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The verdict on one case, with what was seen or what was wrong."""

    name: str
    verdict: str
    """PASS, FAIL or NOT_ASKED."""
    detail: str


def outcome_of(case: Case, chat: Chat) -> Outcome:
    """Ask a case, and return its outcome; the errors of a case become verdicts."""
    try:
        return Outcome(case.name, PASS, case.ask(chat))
    except NotAskedError as reason:
        return Outcome(case.name, NOT_ASKED, str(reason))
    except (NotHeldError, EndpointError) as error:
        return Outcome(case.name, FAIL, str(error))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        return Outcome(case.name, FAIL, f"the answer is no chat completion: {type(error).__name__} {error}")


def require(holds: bool, message: str) -> None:
    """Raise NotHeldError with this message unless the condition holds."""
    if not holds:
        raise NotHeldError(message)


def said(choice: dict[str, Any]) -> str:
    """Return the reasoning content and the content of a choice as one text."""
    message = choice["message"]
    names = ("reasoning_content", "content") if message.get("reasoning_content") else ("reasoning", "content")
    return "".join(message.get(name) or "" for name in names)
