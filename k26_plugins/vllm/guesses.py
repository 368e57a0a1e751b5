"""Speculative decoding on a CPU: each guess is judged by its request's own temperature, top_k and top_p."""

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
    """Each request's value, once for each of its guesses. In the place of `original`, which vLLM has for a CPU.

    That one fills a copy in int64 of what it returns (vLLM 0.32), so that all values which are not int64
    are whatever lay in that memory: answers drawn at random are then no answers of the model's, and a token that a grammar
    or `allowed_token_ids` forbids may come out, which ends the request with an error.

    values: `[requests]`. ends: `[requests]`, how many guesses there are up to each request's last. num_tokens: of all
    requests. Returns `[num_tokens]`, with `replace_to` in the place of `replace_from`.
    """
    counts = ends.diff(prepend=ends.new_zeros(1))
    replaced = torch.where(values == replace_from, replace_to, values).to(values.dtype)
    return replaced.repeat_interleave(counts, output_size=num_tokens)
