"""Corrects speculative decoding on a CPU, so that vLLM verifies each draft token with its request's own temperature,
top_k and top_p."""

from __future__ import annotations

from collections.abc import Callable

import torch


def repeated(
    original: Callable[..., torch.Tensor],
    values: torch.Tensor,
    ends: torch.Tensor,
    num_tokens: int,
    replace_from: int = 0,
    replace_to: int = 0,
) -> torch.Tensor:
    """Repeat each request's value once for each of its draft tokens, in the place of vLLM's `expand_batch_to_tokens`.

    On a CPU vLLM's function writes the values into an int64 copy of the tensor that it returns (vLLM 0.32). So all
    values that are not int64 are whatever lay in that memory: answers that are sampled are then no answers of the
    model's, and a token that a grammar or `allowed_token_ids` forbids may come out, which ends the request with an
    error.

    values: `[requests]`. ends: `[requests]`, the number of draft tokens up to and including each request's last.
    num_tokens: the number of draft tokens of all requests. Returns `[num_tokens]`, of the dtype of `values`, with
    `replace_to` in the place of `replace_from`.
    """
    counts = ends.diff(prepend=ends.new_zeros(1))
    replaced = torch.where(values == replace_from, replace_to, values).to(values.dtype)
    return replaced.repeat_interleave(counts, output_size=num_tokens)
