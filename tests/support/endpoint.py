"""Serves the reference model by a small OpenAI-compatible server in this process, as it is or with a fault put into it.

The server speaks as vLLM does, or as a vendor's API that reports nothing but the likeliest tokens of answers. It
computes in bfloat16, as engines do. The tests of `k26 verify` and `k26 swarm` run against it.
"""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import torch
from support.local_http import QuietHandler, serving

from k26_plugins.common.checkpoint import Checkpoint
from k26_plugins.common.model.config import K26Config
from k26_plugins.common.multimodal.image import MediaConfig, navit_resize, normalize, open_image, preprocess
from k26_plugins.common.prompt.chat import expand_media_placeholders, render
from k26_plugins.common.prompt.tokenizer import KimiTokenizer
from k26_plugins.common.reference.kimi_k26 import KimiK26


@dataclass(kw_only=True)
class Fault:
    """A fault of the served model. Each field changes one step of serving; by default none does."""

    name: str = "none"
    read_as: Callable[[str], str] = lambda name: name
    """Returns the name of the tensor that is read from the checkpoint in place of the given one."""
    tensor: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, tensor: tensor
    """Changes a tensor of the checkpoint; takes its name and its value."""
    config: Callable[[K26Config], K26Config] = lambda config: config
    padding: float | None = None
    """The value of padded pixels after normalizing; None leaves them right."""
    text: Callable[[str], str] = lambda text: text
    """Changes a chat's prompt as the template rendered it, before it is tokenized."""
    token_ids: Callable[[list[int]], list[int]] = lambda token_ids: token_ids
    """Changes the token ids of a chat's prompt, as the model reads them and as the answer reports them."""


@dataclass
class Altered:
    """A checkpoint with a fault, in the form in which KimiK26 reads checkpoints."""

    checkpoint: Checkpoint
    fault: Fault
    config: K26Config = field(init=False)

    def __post_init__(self) -> None:
        self.config = self.fault.config(self.checkpoint.config)

    def tensor(self, name: str) -> torch.Tensor:
        return self.fault.tensor(name, self.checkpoint.tensor(self.fault.read_as(name)))


class Served:
    """The model of one server, and its answers to requests of the two APIs."""

    def __init__(
        self,
        folder: Path,
        fault: Fault,
        *,
        vendor: bool,
        message: dict[str, Any] | None = None,
        speak: Callable[[list[dict[str, Any]]], str] | None = None,
    ) -> None:
        """Load the model with its fault.

        vendor: whether to speak as a vendor's API does. message: the choice, with `message` and `finish_reason`, that
        answers every request with tools. speak: returns the text that answers a chat, given its messages, in place of
        the model.
        """
        self.folder, self.fault, self.vendor, self.message, self.speak = folder, fault, vendor, message, speak
        self.model = KimiK26(Altered(Checkpoint(folder), fault))  # type: ignore[arg-type]
        self.tokenizer = KimiTokenizer(folder)
        self.media = MediaConfig.from_path(folder)

    def completions(self, body: dict[str, Any]) -> dict[str, Any]:
        given = body["prompt"]
        prompt = self.tokenizer.encode_prompt(given) if isinstance(given, str) else given
        choice = self._answer(prompt, (), body, body.get("logprobs") or 0)
        tokens = [f"token_id:{token}" for token in choice["ids"]]
        top = [{f"token_id:{token}": value for token, value in entry.items()} for entry in choice["answered"]]
        logprobs = {"tokens": tokens, "top_logprobs": top}
        answer = {"logprobs": logprobs, "prompt_logprobs": choice["prompt"], "finish_reason": "length"}
        return {"choices": [{**answer, "prompt_token_ids": prompt}], "usage": {"prompt_tokens": len(prompt)}}

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        if "tools" in body and self.message is not None:
            return {"choices": [{**self.message, "message": self.message["message"]}], "usage": {"prompt_tokens": 1}}
        thinking = body.get("chat_template_kwargs", {}).get("thinking", True)
        text = self.fault.text(render(body["messages"], self.folder, tools=body.get("tools"), thinking=thinking))
        parts = [
            part for message in body["messages"] if isinstance(message["content"], list) for part in message["content"]
        ]
        urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        images = [open_image(base64.b64decode(url.split(",", 1)[1])) for url in urls]
        counts = [navit_resize(*image.size, self.media).num_tokens for image in images]
        placeholder = self.model.config.media_placeholder_token_id
        token_ids = self.tokenizer.encode_prompt(text)
        expanded = expand_media_placeholders(token_ids, counts, placeholder)
        pixels = self._pixels(images) if images else ()
        if self.speak is not None:
            ids = self.tokenizer.encode(self.speak(body["messages"]))
            answered = [_made_up(expanded, place, token) for place, token in enumerate(ids)]
            choice: dict[str, Any] = {"ids": ids, "answered": answered, "prompt": None}
            reason = "stop"
        else:
            choice = self._answer(expanded, pixels, body, body.get("top_logprobs") or 0, shift=True)
            reason = "length"
        content = [
            self._entry(token, entry[token]) | {"top_logprobs": [self._entry(*item) for item in entry.items()]}
            for token, entry in zip(choice["ids"], choice["answered"], strict=True)
        ]
        said = self.tokenizer.decode([token for token in choice["ids"] if token < 256])
        answer: dict[str, Any] = {
            "choices": [{"message": {"content": said}, "logprobs": {"content": content}, "finish_reason": reason}],
            "usage": {"prompt_tokens": len(expanded), "completion_tokens": len(choice["ids"])},
        }
        if not self.vendor:
            answer |= {"prompt_token_ids": self.fault.token_ids(expanded), "prompt_logprobs": choice["prompt"]}
        return answer

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self.tokenizer.token_bytes(token)
        shown = raw.decode("utf-8", "replace") if self.vendor else f"token_id:{token}"
        return {"token": shown, "logprob": logprob, "bytes": list(raw)}

    def _pixels(self, images: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        patches, grids = preprocess([[image] for image in images], self.media)
        values = torch.from_numpy(normalize(patches, self.media))
        if self.fault.padding is not None:
            # This holds for a single image, whose height and width say where its padding is.
            (_, grid_h, grid_w), size = grids[0].tolist(), self.media.patch_size
            picture = (
                values.view(grid_h, grid_w, 3, size, size).permute(2, 0, 3, 1, 4).reshape(3, grid_h * size, -1).clone()
            )
            picture[:, images[0].height :] = self.fault.padding
            picture[:, :, images[0].width :] = self.fault.padding
            cut = picture.view(3, grid_h, size, grid_w, size).permute(1, 3, 0, 2, 4)
            values = cut.reshape(-1, 3, size, size)
        return values, torch.from_numpy(grids)

    def _answer(
        self,
        token_ids: list[int],
        pixels: tuple[torch.Tensor, ...],
        body: dict[str, Any],
        top: int,
        *,
        shift: bool = False,
    ) -> dict[str, Any]:
        seen = self.fault.token_ids(token_ids) if shift else token_ids
        logprobs = self.model.logprobs(torch.tensor(seen), *pixels)
        reported: list[Any] = [None]
        asked: Any = body.get("prompt_logprobs")
        for row, token in zip(logprobs[:-1], token_ids[1:], strict=True) if asked is not None else ():
            entry = self._top(row, asked) | {token: float(row[token])}
            reported.append({str(key): {"logprob": value} for key, value in entry.items()})
        answered: list[dict[int, float]] = []
        ids: list[int] = []
        for _ in range(body["max_tokens"]):
            row = self.model.logprobs(torch.tensor([*seen, *ids]), *pixels)[-1]
            ids.append(int(row.argmax()))
            answered.append(self._top(row, max(top, 1)))
            if ids[-1] == self.model.config.media_placeholder_token_id:
                break
        return {"prompt": reported, "ids": ids, "answered": answered}

    @staticmethod
    def _top(row: torch.Tensor, count: int) -> dict[int, float]:
        values, ids = row.topk(count)
        return dict(zip(ids.tolist(), values.tolist(), strict=True))


def _made_up(token_ids: list[int], place: int, token: int) -> dict[int, float]:
    """Return made-up log-probabilities, `token` the likeliest, that depend on the whole prompt, as a model's do."""
    rng = random.Random(repr((token_ids, place)))
    return {token: -0.5, **{other: -1.5 - 3 * rng.random() for other in rng.sample(range(256), 4) if other != token}}


def streamed(answer: dict[str, Any]) -> bytes:
    """Return a chat completion as server-sent events: a chunk about the prompt, one for each token, then the usage."""
    choice = answer["choices"][0]
    said = choice["message"].get("content") or ""
    entries = (choice.get("logprobs") or {"content": [None]})["content"]
    size = -(-len(said) // max(len(entries), 1))
    pieces = [
        {"delta": {"content": said[size * number : size * (number + 1)]}, "logprobs": {"content": [entry]}}
        for number, entry in enumerate(entries)
    ]
    for index, call in enumerate(choice["message"].get("tool_calls") or []):
        begun = {"id": call["id"], "function": {"name": call["function"]["name"], "arguments": ""}}
        middle = len(call["function"]["arguments"]) // 2
        rest = [call["function"]["arguments"][part] for part in (slice(middle), slice(middle, None))]
        parts = [begun, *({"function": {"arguments": part}} for part in rest)]
        pieces += [{"delta": {"tool_calls": [{"index": index, **part}]}} for part in parts]
    chunks: list[dict[str, Any]] = [
        {
            "choices": [{"delta": {"role": "assistant", "content": ""}}],
            "prompt_token_ids": answer.get("prompt_token_ids"),
        },
        *({"choices": [piece]} for piece in pieces),
        {"choices": [{"delta": {}, "finish_reason": choice["finish_reason"]}]},
        {"choices": [], "usage": answer["usage"]},
    ]
    # Engines write characters beyond ASCII into events as they are, without escapes.
    events = [*(json.dumps(chunk, ensure_ascii=False) for chunk in chunks), "[DONE]"]
    return b"".join(b"data: %s\n\n" % event.encode() for event in events)


@contextmanager
def serve_reference(
    folder: Path,
    fault: Fault | None = None,
    *,
    vendor: bool = False,
    message: dict[str, Any] | None = None,
    speak: Callable[[list[dict[str, Any]]], str] | None = None,
) -> Iterator[str]:
    """Serve the reference model of the checkpoint in `folder` until the block ends, and yield the server's URL.

    vendor, message, speak: as `Served` takes them.
    """
    served = Served(folder, fault or Fault(), vendor=vendor, message=message, speak=speak)

    class Handler(QuietHandler, BaseHTTPRequestHandler):  # the second base: a linter knows its methods by it
        def do_GET(self) -> None:
            paths = {"/v1/models": {"data": [{"id": "tiny"}]}} | ({} if vendor else {"/version": {"version": "test"}})
            self._send(paths.get(self.path))

        def do_POST(self) -> None:
            body = self.body()
            paths = {"/v1/chat/completions": served.chat} | ({} if vendor else {"/v1/completions": served.completions})
            answer = paths.get(self.path)
            content = answer(body) if answer else None
            self._send(streamed(content) if content and body.get("stream") else content)

        def _send(self, content: Any) -> None:
            encoded = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send(404 if content is None else 200, encoded)

    with serving(Handler) as address:
        yield address


def yarn_factor(factor: float) -> Callable[[K26Config], K26Config]:
    """Return a change of the configuration, for `Fault.config`, that gives YaRN this factor."""

    def change(config: K26Config) -> K26Config:
        scaling = replace(config.text.rope_scaling, factor=factor)
        return replace(config, text=replace(config.text, rope_scaling=scaling))

    return change
