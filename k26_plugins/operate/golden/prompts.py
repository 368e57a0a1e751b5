"""Read a file of prompts, and render and tokenize them as the model wants them.

Each line of the file is a JSON object:

    {"id": "hello", "messages": [{"role": "user", "content": "Hello"}]}
    {"id": "photo", "messages": [{"role": "user", "content": [{"type": "image", "image": "photo.png"},
                                                              {"type": "text", "text": "What is this?"}]}]}
    {"id": "raw", "text": "The capital of France is"}

`thinking` (true by default) and `tools` may stand beside `messages`. An image is a path, relative to the file of
prompts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from k26_plugins.common.model.config import K26Config
from k26_plugins.common.multimodal.image import MediaConfig, MediaError, navit_resize, normalize, open_image, preprocess
from k26_plugins.common.prompt.chat import expand_media_placeholders, render
from k26_plugins.common.prompt.tokenizer import KimiTokenizer


class PromptError(ValueError):
    """The error for a file of prompts that cannot be used. The message names the file or the line, and the remedy."""


@dataclass(slots=True, kw_only=True)
class Prompt:
    """One prompt, ready for the model and for an endpoint."""

    name: str
    request: dict[str, Any]
    """`messages` (with `tools` and `thinking`) or `text`, as in the file, but an image part holds the image's index in
    `images` instead of a path."""
    text: str = ""
    """The rendered prompt, with one placeholder for each image; empty if `messages` have not been rendered."""
    token_ids: list[int] = field(default_factory=list)
    """The tokens of `text`, each placeholder repeated to its image's number of tokens; empty before tokenizing."""
    images: list[bytes] = field(default_factory=list)
    """The bytes of the image files."""


def read_requests(file: Path) -> list[Prompt]:
    """Return the prompts in `file` and read their images, but neither render nor tokenize them. Raises PromptError."""
    prompts: list[Prompt] = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{file} cannot be read ({error}): give a file with a JSON object a line.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{file.name}, line {number}"
        try:
            prompts.append(_request(json.loads(line), where, file.parent))
        except (json.JSONDecodeError, MediaError, OSError, KeyError, TypeError, AttributeError) as error:
            raise PromptError(f"{where}: {error}. See `k26 golden --help` for what a line holds.") from error
    names = [prompt.name for prompt in prompts]
    if not prompts or len(set(names)) < len(names):
        found = "no prompt" if not prompts else "an id twice"
        raise PromptError(f"{file} holds {found}: give each prompt an id of its own.")
    return prompts


def read_prompts(file: Path, folder: Path) -> list[Prompt]:
    """Return the prompts in `file`, rendered and tokenized for the checkpoint in `folder`.

    Raises PromptError; ConfigError, TokenizerError or MediaError if the checkpoint's own files cannot be used.
    """
    config = K26Config.from_path(folder)
    tokenizer = KimiTokenizer(folder)
    tokenizer.check(config)
    media = MediaConfig.from_path(folder)
    prompts = read_requests(file)
    for prompt in prompts:
        request = prompt.request
        prompt.text = prompt.text or render(
            request["messages"], folder, tools=request.get("tools"), thinking=request.get("thinking", True)
        )
        counts = [navit_resize(*open_image(image).size, media).num_tokens for image in prompt.images]
        token_ids = tokenizer.encode_prompt(prompt.text)
        prompt.token_ids = expand_media_placeholders(token_ids, counts, config.media_placeholder_token_id)
    return prompts


def _request(request: dict[str, Any], where: str, base: Path) -> Prompt:
    if bool(request.get("messages")) == bool(request.get("text")):
        raise PromptError(f"{where}: expected either `messages` or `text`, with something in it.")
    name = str(request.pop("id", where))
    images: list[bytes] = []
    for message in request.get("messages", []):
        for part in message["content"] if isinstance(message["content"], list) else []:
            if part["type"] == "image":
                images.append((base / part["image"]).read_bytes())
                open_image(images[-1])
                part["image"] = len(images) - 1
    return Prompt(name=name, request=request, text=request.get("text", ""), images=images)


def pixels(prompt: Prompt, folder: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the vision tower's input for the prompt's images.

    The three tensors are pixel_values, float32 `[P, 3, patch, patch]`; grid_thw, int64 `[num_images, 3]`; and which
    pixels are padding, bool, in the shape of pixel_values. Raises MediaError.
    """
    media = MediaConfig.from_path(folder)
    opened = [open_image(image) for image in prompt.images]
    patches, grids = preprocess([[image] for image in opened], media)
    padding = []
    for image, (_, grid_h, grid_w) in zip(opened, grids.tolist(), strict=True):
        resize = navit_resize(*image.size, media)
        mask = torch.ones(grid_h * media.patch_size, grid_w * media.patch_size, dtype=torch.bool)
        mask[: resize.height, : resize.width] = False
        cut = mask.view(grid_h, media.patch_size, grid_w, media.patch_size).transpose(1, 2)
        padding.append(cut.flatten(0, 1).unsqueeze(1).expand(-1, 3, -1, -1))
    return torch.from_numpy(normalize(patches, media)), torch.from_numpy(grids), torch.cat(padding)
