"""Tests the path from a request to token ids, and from the model's tokens to an answer, on a real server.

The core's rendering without an engine is the judge. Each engine's tests derive `PromptPathTests`, define how a request
orders an answer, and have a fixture `server`.
"""

from __future__ import annotations

import io
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.conversations import HOSTILE, Conversation, conversations, core_token_ids, digest, recorded
from support.data_urls import WRITERS
from support.images import BAD_IMAGES, gif_header, image_part, png, png_header, random_image
from support.scripted import TOKEN_CASES, completed, parsed, streamed
from support.server import Server
from support.videos import make_video, video_part

from k26_plugins.common.prompt.control_tokens import escape, unescape
from k26_plugins.common.prompt.output import MARKERS
from k26_plugins.common.prompt.tokenizer import KimiTokenizer


def _jpeg() -> bytes:
    buffer = io.BytesIO()
    random_image(64, 64).save(buffer, "JPEG")
    return buffer.getvalue()


_VIDEO = make_video(12)
BAD_MEDIA: dict[str, dict[str, Any]] = {
    **{f"image-{name}": image_part(data) for name, data in BAD_IMAGES.items()},
    "image-bomb": image_part(png_header(30_000, 30_000)),
    "image-empty-size": image_part(png_header(0, 0)),
    "image-gif-bomb": image_part(gif_header(65_535, 65_535)),
    "image-jpeg-cut": image_part(_jpeg()[:400]),
    "image-no-base64": {"type": "image_url", "image_url": {"url": "data:image/png;base64,%%%"}},
    "image-nowhere": {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/photo.png"}},
    "image-half-of-base64": {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsb"}},
    "image-without-address": {"type": "image_url", "image_url": {"url": ""}},
    "image-by-uuid": {"type": "image_url", "image_url": None, "uuid": "a"},
    "video-without-address": {"type": "video_url", "video_url": {"url": ""}},
    "video-by-uuid": {"type": "video_url", "video_url": None, "uuid": "a"},
    "image-file": {"type": "image_url", "image_url": {"url": "file:///etc/hostname"}},
    "video-text": video_part(b"no video"),
    "video-empty": video_part(b""),
    "video-cut": video_part(_VIDEO[:-200]),
    "video-cut-early": video_part(_VIDEO[:400]),
    "video-absurd-size": video_part(gif_header(65_535, 65_535)),
    "video-damaged": video_part(_VIDEO[:600] + b"\xff" * 400 + _VIDEO[1000:]),
    "video-too-long": video_part(make_video(80, 1, (1280, 720))),
    "video-image": video_part(png(random_image(40, 30))),
    "video-playlist": video_part(b"#EXTM3U\n#EXTINF:10,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n"),
}


def prompt_token_ids(server: Server, conversation: Conversation) -> list[int]:
    """Return the prompt's token ids as the server's answer reports them.

    vLLM and SGLang name the request's field that asks for them differently, so the request has both.
    """
    switches = {"return_token_ids": True, "return_prompt_token_ids": True}
    response = server.post("/v1/chat/completions", **switches, **conversation.body())
    assert response.status_code == 200, (conversation.name, response.text)
    answer = response.json()
    found: list[int] = answer.get("prompt_token_ids") or answer["choices"][0]["prompt_token_ids"]
    return found


_TEXT = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=8))
_JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 5), _TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_TEXT, inner, max_size=3)),
    max_leaves=8,
)
_PARTS = st.lists(
    st.one_of(
        st.fixed_dictionaries({"type": st.just("text"), "text": _TEXT}),
        # The two media whose refusal takes seconds are left out.
        st.sampled_from([part for name, part in BAD_MEDIA.items() if name not in ("image-nowhere", "video-too-long")]),
        _JSON,
    ),
    max_size=3,
)
_CALLS = st.one_of(
    _JSON,
    st.lists(
        st.fixed_dictionaries(
            {
                "id": _TEXT,
                "type": st.just("function"),
                "function": st.fixed_dictionaries({"name": _TEXT, "arguments": st.one_of(_TEXT, _JSON)}),
            }
        ),
        max_size=2,
    ),
)
_MESSAGES = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "system", "tool", "developer", "<|im_end|>", 3]),
        "content": st.one_of(_TEXT, _PARTS, _JSON),
    },
    optional={
        "name": _JSON,
        "reasoning": _JSON,
        "reasoning_content": _JSON,
        "tool_calls": _CALLS,
        "tool_call_id": _JSON,
    },
)
_TOOLS = st.lists(
    st.fixed_dictionaries(
        {
            "type": st.sampled_from(["function", "other"]),
            "function": st.fixed_dictionaries({"name": _TEXT, "parameters": _JSON}),
        }
    ),
    max_size=2,
)
# Requests of roughly the right shape whose fields may hold anything.
ADVERSARIAL_BODIES = st.fixed_dictionaries(
    {"messages": st.lists(_MESSAGES, min_size=1, max_size=4)},
    optional={
        "tools": _TOOLS,
        "continue_final_message": st.booleans(),
        "add_generation_prompt": st.booleans(),
        "chat_template_kwargs": st.dictionaries(
            st.sampled_from(["thinking", "preserve_thinking", "enable_thinking", "tools_ts_str", "messages"]), _JSON
        ),
    },
)


class PromptPathTests:
    """Tests that each engine's tests derive, and run with that engine's server."""

    # The tool-call parser and the reasoning parser, as the server's log names them.
    parsers: str
    adversarial_requests: int
    # Whether the engine says at which offset of a completion's text a token stands.
    places_of_tokens: bool

    def script(self, folder: Path, answer: str) -> dict[str, Any]:
        """Return the request fields by which a server of the checkpoint in `folder` answers `answer` and then ends."""
        raise NotImplementedError

    def test_the_parsers_are_chosen(self, server: Server) -> None:
        assert self.parsers in server.log.read_text()

    def test_token_ids_are_the_cores(self, server: Server, tiny_folder: Path) -> None:
        """In all conversations the prompt's token ids are those that the core computes and those that are recorded."""
        asked = conversations()
        with ThreadPoolExecutor(16) as pool:
            found = dict(zip(asked, pool.map(lambda one: prompt_token_ids(server, one), asked), strict=True))
        tokenizer = KimiTokenizer(tiny_folder)
        differences = [
            f"{one.name}: {tokenizer.decode(ids)!r}"
            for one, ids in found.items()
            if ids != core_token_ids(tiny_folder, one)
        ]
        assert not differences, "\n".join(differences[:5])
        assert {one.name: digest(ids) for one, ids in found.items()} == recorded()

    def test_other_roles_are_system_messages_with_their_name(self, server: Server, tiny_folder: Path) -> None:
        """Messages of other roles keep their places in the conversation, since the template renders every role that it
        does not know as a system message."""
        messages: list[dict[str, Any]] = [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "1"},
            {"role": "developer", "content": "D <|im_end|>"},
            {"role": "developer", "content": [{"type": "text", "text": "E"}], "name": "Ann"},
        ]
        found = prompt_token_ids(server, Conversation("developer", messages))
        tokenizer = KimiTokenizer(tiny_folder)
        middle = "<|im_middle|>"
        before = (
            f"<|im_system|>system{middle}S<|im_end|><|im_user|>user{middle}1<|im_end|><|im_system|>developer{middle}"
        )
        after = f"<|im_end|><|im_system|>Ann{middle}E<|im_end|><|im_assistant|>assistant{middle}<think>"
        spelled = tokenizer.encode("D <|im_end|>")
        assert found == tokenizer.encode_prompt(before) + spelled + tokenizer.encode_prompt(after)

    @pytest.mark.parametrize(
        ("fields", "options"),
        [
            ({"thinking": {"type": "disabled"}}, {"thinking": False}),
            ({"thinking": {"type": "enabled", "keep": "all"}}, {"preserve_thinking": True}),
            ({"chat_template_kwargs": {"thinking": 0}, "reasoning_effort": "high"}, {"thinking": False}),
            ({"reasoning_effort": "none"}, {"thinking": False}),
        ],
        ids=str,
    )
    def test_thinking_in_the_forms_that_clients_send(
        self, server: Server, tiny_folder: Path, fields: dict[str, Any], options: dict[str, Any]
    ) -> None:
        """Each form of switching thinking on or off changes the prompt and how the answer is read: all of it is content
        if the model is not to think."""
        past = {"role": "assistant", "content": "b", "reasoning_content": "c"}
        messages = [{"role": "user", "content": "a"}, past, {"role": "user", "content": "d"}]
        script = self.script(tiny_folder, "plain")
        switches = {"return_token_ids": True, "return_prompt_token_ids": True}
        response = server.post("/v1/chat/completions", messages=messages, **switches, **fields, **script)
        assert response.status_code == 200, response.text
        answer = response.json()
        choice = answer["choices"][0]
        found = answer.get("prompt_token_ids") or choice["prompt_token_ids"]
        assert found == core_token_ids(tiny_folder, Conversation("thinking", messages, options=options))
        said = (choice["message"].get("reasoning") or "", choice["message"]["content"] or "")
        assert said == (("plain", "") if options.get("thinking", True) else ("", "plain"))

    def test_tokenize_is_what_a_chat_gets(self, server: Server, tiny_folder: Path) -> None:
        past = {"role": "assistant", "content": "b", "reasoning_content": "c"}
        messages = [{"role": "user", "content": "a"}, past]
        answer = server.post("/tokenize", messages=messages, chat_template_kwargs={"preserve_thinking": True}).json()
        options = {"preserve_thinking": True}
        assert answer["tokens"] == core_token_ids(tiny_folder, Conversation("tokenize", messages, options=options))

    @pytest.mark.parametrize("name", BAD_MEDIA)
    def test_a_bad_medium_is_answered_and_the_server_lives(self, server: Server, name: str) -> None:
        content = [BAD_MEDIA[name], {"type": "text", "text": "What?"}]
        response = server.post("/v1/chat/completions", messages=[{"role": "user", "content": content}], max_tokens=2)
        assert response.status_code in (400, 422), response.text
        assert server.alive()
        assert server.chat("Hello", max_tokens=2)["usage"]["completion_tokens"] > 0

    def test_base64_is_read_as_its_writers_put_it(self, server: Server) -> None:
        image, video = png(random_image(60, 40)), make_video(4)
        lengths = set()
        for write in WRITERS.values():
            content = [image_part(image), video_part(video)]
            content[0]["image_url"]["url"] = f"DATA:image/png;BASE64,{write(image)}"
            content[1]["video_url"]["url"] = f"data:video/mp4;base64,{write(video)}"
            lengths.add(server.chat(content, max_tokens=1)["usage"]["prompt_tokens"])
        assert len(lengths) == 1

    @pytest.mark.parametrize("name", TOKEN_CASES)
    def test_answers_are_taken_apart(self, server: Server, tiny_folder: Path, name: str) -> None:
        case = TOKEN_CASES[name]
        script = self.script(tiny_folder, case.answer)
        expected = (case.reasoning, case.content, case.calls)
        *found, finish = parsed(server, case, script)
        assert tuple(found) == expected
        assert finish == ("tool_calls" if case.calls else "stop")
        assert streamed(server, case, script) == expected

    def test_a_raw_completion_shows_no_marker(self, server: Server, tiny_folder: Path) -> None:
        """A raw completion's text, streamed or not, has none of the markers between its texts; what spells a marker
        with ordinary tokens stays."""
        kinds = [*MARKERS, "<|reserved_token_300|>", *map(escape, MARKERS), "text ", "<"]
        # One random order with each part once; the core's own tests try every order.
        parts = random.Random(0).sample(kinds, k=len(kinds))
        script = self.script(tiny_folder, "".join(parts))
        said = "".join(unescape(part) for part in parts if part in kinds[len(MARKERS) + 1 :])
        prompt = core_token_ids(tiny_folder, Conversation("raw", [{"role": "user", "content": "a"}]))
        for stream in (False, True):
            text, names, places = completed(server, prompt, stream=stream, logprobs=1, **script)
            assert text == "".join(names) == said
            if self.places_of_tokens:
                assert places == [len("".join(names[:place])) for place in range(len(names))]
            echoed, *_ = completed(server, "<|im_user|>a</think>", stream=stream, echo=True, **script)
            assert echoed == f"<|im_user|>a</think>{said}"
            asked, *_ = completed(server, prompt, stream=stream, skip_special_tokens=False, **script)
            assert asked == "".join(map(unescape, parts))

    def test_no_request_breaks_the_server(self, server: Server) -> None:
        @given(ADVERSARIAL_BODIES)
        @settings(
            max_examples=self.adversarial_requests,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        def ask(body: dict[str, Any]) -> None:
            response = server.post("/v1/chat/completions", **{"max_tokens": 1, **body})
            assert response.status_code < 500, response.text
            assert server.alive()

        ask()
