"""What both engines' servers are asked about prompts, and what must come of it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from support.conversations import HOSTILE, Conversation, conversations, core_token_ids, digest, recorded
from support.images import BAD_IMAGES, image_part, png, png_header, random_image
from support.server import Server
from support.videos import make_video, video_part

from k26_plugins.common.prompt.tokenizer import KimiTokenizer

_VIDEO = make_video(12)
BAD_MEDIA: dict[str, dict[str, Any]] = {
    **{f"image-{name}": image_part(data) for name, data in BAD_IMAGES.items()},
    "image-bomb": image_part(png_header(30_000, 30_000)),
    "image-empty-size": image_part(png_header(0, 0)),
    "image-no-base64": {"type": "image_url", "image_url": {"url": "data:image/png;base64,%%%"}},
    "video-text": video_part(b"no video"),
    "video-empty": video_part(b""),
    "video-cut": video_part(_VIDEO[:-200]),
    "video-image": video_part(png(random_image(40, 30))),
    "video-playlist": video_part(b"#EXTM3U\n#EXTINF:10,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n"),
}


def prompt_token_ids(server: Server, conversation: Conversation) -> list[int]:
    """Of the server's answer to a conversation; vLLM and SGLang name the field's switch differently."""
    switches = {"return_token_ids": True, "return_prompt_token_ids": True}
    response = server.post("/v1/chat/completions", **switches, **conversation.body())
    assert response.status_code == 200, (conversation.name, response.text)
    answer = response.json()
    found: list[int] = answer.get("prompt_token_ids") or answer["choices"][0]["prompt_token_ids"]
    return found


def assert_same_token_ids(server: Server, folder: Path) -> None:
    """All conversations: the core's token ids, and those that are recorded."""
    asked = conversations()
    with ThreadPoolExecutor(16) as pool:
        found = dict(zip(asked, pool.map(lambda one: prompt_token_ids(server, one), asked), strict=True))
    tokenizer = KimiTokenizer(folder)
    differences = [
        f"{one.name}: {tokenizer.decode(ids)!r}" for one, ids in found.items() if ids != core_token_ids(folder, one)
    ]
    assert not differences, "\n".join(differences[:5])
    assert {one.name: digest(ids) for one, ids in found.items()} == recorded()


def assert_bad_medium_is_answered(server: Server, name: str) -> None:
    content = [BAD_MEDIA[name], {"type": "text", "text": "What?"}]
    response = server.post("/v1/chat/completions", messages=[{"role": "user", "content": content}], max_tokens=2)
    assert response.status_code in (400, 422), response.text
    assert server.alive()
    assert server.chat("Hello", max_tokens=2)["usage"]["completion_tokens"] > 0


_TEXT = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=8))
_JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 5), _TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_TEXT, inner, max_size=3)),
    max_leaves=8,
)
_PARTS = st.lists(
    st.one_of(
        st.fixed_dictionaries({"type": st.just("text"), "text": _TEXT}),
        st.sampled_from(list(BAD_MEDIA.values())),
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
# Requests of about the right shape with anything in them.
HOSTILE_BODIES = st.fixed_dictionaries(
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
