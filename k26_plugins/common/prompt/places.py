"""Find and replace the placeholders of media among a prompt's token ids.

Engines that load media after they tokenize the prompt need this.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from k26_plugins.common.prompt.control_tokens import escape


def media_kinds(token_ids: Sequence[int], tokenizer: Any) -> list[str]:
    """Return what each placeholder of a prompt stands for, in order: `image` or `video`.

    tokenizer: a Hugging Face tokenizer of this model. Raises ValueError for a placeholder that is not where the chat
    template puts it.
    """
    return [_text(tokenizer, token_ids[begin + 1 : content]) for begin, content, _ in _places(token_ids, tokenizer)]


def place_videos(token_ids: Sequence[int], videos: Sequence[Sequence[str]], tokenizer: Any) -> list[int]:
    """Return the token ids with each video's single placeholder replaced by its chunks, whose prompts `videos` holds.

    The text before a video is tokenized again together with the first chunk's timestamp, as if the prompt had been
    completed before tokenization. Raises ValueError if there are not as many placeholders as videos.
    """
    places = [
        place
        for place in _places(token_ids, tokenizer)
        if _text(tokenizer, token_ids[place[0] + 1 : place[1]]) == "video"
    ]
    if len(places) != len(videos):
        raise ValueError(f"the prompt has {len(places)} places for videos and {len(videos)} videos were given.")
    first_control = tokenizer.convert_tokens_to_ids("[BOS]")
    placed: list[int] = []
    done = 0
    for (begin, _, end), prompts in zip(places, videos, strict=True):
        start = begin
        while start > done and token_ids[start - 1] < first_control:
            start -= 1
        text = escape(_text(tokenizer, token_ids[start:begin])) + "".join(prompts)
        placed += [*token_ids[done:start], *tokenizer.encode(text, add_special_tokens=False)]
        done = end + 1
    return [*placed, *token_ids[done:]]


def _places(token_ids: Sequence[int], tokenizer: Any) -> Iterator[tuple[int, int, int]]:
    """Yield the positions of each placeholder's beginning, of its content token and of its end.

    Raises ValueError for a placeholder that these tokens do not enclose, which a raw prompt may contain.
    """
    names = ("<|media_begin|>", "<|media_content|>", "<|media_pad|>", "<|media_end|>")
    begin_id, content_id, pad_id, end_id = (tokenizer.convert_tokens_to_ids(name) for name in names)
    begin = -1
    for position, token_id in enumerate(token_ids):
        if token_id == begin_id:
            begin = position
        elif token_id == pad_id:
            if begin < 0 or list(token_ids[position - 1 : position + 2]) != [content_id, pad_id, end_id]:
                raise ValueError("a medium's placeholder is not where the chat template puts it.")
            yield begin, position - 1, position + 1
            begin = -1


def _text(tokenizer: Any, token_ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
