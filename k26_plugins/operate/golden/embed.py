"""Compute the first hidden states of every carried model from rows of the embedding and from the vision tower."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from k26_plugins.common.checkpoint import StreamedCheckpoint
from k26_plugins.common.reference.moonvit import MoonViT
from k26_plugins.operate.golden.layers import Stream
from k26_plugins.operate.golden.prompts import Prompt, pixels

VISION = ("vision_tower.", "mm_projector.")
EMBED_TOKENS = "language_model.model.embed_tokens.weight"


def embed_tokens(checkpoint: StreamedCheckpoint, token_ids: torch.Tensor) -> torch.Tensor:
    """Return the embeddings of token ids `[T]`, bfloat16 `[T, hidden_size]`; each row that occurs is read once."""
    unique, inverse = token_ids.unique(return_inverse=True)
    rows = [checkpoint.rows(EMBED_TOKENS, token, token + 1) for token in unique.tolist()]
    return torch.cat(rows)[inverse]


@torch.inference_mode()
def embed_prompts(checkpoint: StreamedCheckpoint, prompts: Sequence[Prompt], streams: Sequence[Stream]) -> None:
    """Set every stream's hidden states to the embeddings of its prompts, in the stream's dtype."""
    placeholder = checkpoint.config.media_placeholder_token_id
    texts: dict[int, torch.Tensor] = {}
    for index in streams[0].prompts:
        ids = torch.tensor(prompts[index].token_ids)
        texts[index] = embed_tokens(checkpoint, ids.masked_fill(ids == placeholder, 0))
    media = _embed_media(checkpoint, prompts, streams)
    for stream in streams:
        parts = []
        for index, length in zip(stream.prompts, stream.lengths, strict=True):
            hidden = texts[index].to(stream.variant.dtype)
            if prompts[index].images:
                places = torch.tensor(prompts[index].token_ids) == placeholder
                hidden = hidden.clone()
                hidden[places] = media[stream.variant.dtype, stream.variant.padding, index]
            parts.append(hidden[:length])
        stream.hidden = torch.cat(parts)


def _embed_media(
    checkpoint: StreamedCheckpoint, prompts: Sequence[Prompt], streams: Sequence[Stream]
) -> dict[tuple[torch.dtype, float | None, int], torch.Tensor]:
    """Return the embeddings of each prompt's images by dtype, value of the padding and the prompt's number.

    The vision tower computes one image at a time.
    """
    wanted = dict.fromkeys(
        (stream.variant.dtype, stream.variant.padding, index)
        for stream in streams
        for index in stream.prompts
        if prompts[index].images
    )
    out: dict[tuple[torch.dtype, float | None, int], torch.Tensor] = {}
    names = [name for name in checkpoint.table if name.startswith(VISION)] if wanted else []
    read = {name: checkpoint.tensor(name) for name in names}
    for dtype in dict.fromkeys(key[0] for key in wanted):
        tower = _load_tower(checkpoint, read, dtype)
        for key in (key for key in wanted if key[0] == dtype):
            _, padding, index = key
            pixel_values, grid_thw, padded = pixels(prompts[index], checkpoint.folder)
            if padding is not None:
                pixel_values = pixel_values.masked_fill(padded, padding)
            patches = grid_thw.prod(-1).tolist()
            parts = zip(pixel_values.split(patches), grid_thw.split(1), strict=True)
            out[key] = torch.cat([tower(values, grid)[0] for values, grid in parts])
    return out


def _load_tower(checkpoint: StreamedCheckpoint, read: dict[str, torch.Tensor], dtype: torch.dtype) -> MoonViT:
    with torch.device("meta"):
        tower = MoonViT(checkpoint.config.vision)
    tower.load_state_dict({name: tensor.to(dtype) for name, tensor in read.items()}, assign=True)
    return tower


def largest_number_of_patches(prompts: Sequence[Prompt], folder: Path) -> int:
    """Return the number of image patches of the prompt that has the most, 0 without images."""
    return max((int(pixels(prompt, folder)[1].prod(-1).sum()) for prompt in prompts if prompt.images), default=0)
