"""Computes MLA's prefill on a CPU in memory that grows with a prompt's length and not with its square.

The in-tree backend holds heads × queries × keys scores in float32, three times over: for a prompt of 10,000 tokens at
64 heads each of the three takes 26 GB. This module does the same arithmetic for a few heads and queries at once, so
that the number of scores held at a time is bounded.
"""

from __future__ import annotations

from typing import Any

import torch

from k26_plugins.vllm import compat

SCORES = 2**24
"""The largest number of scores that are held at once: 64 MB of float32."""
QUERIES = 256
"""The largest number of queries that are computed at once. It is small, so that most scores that the causal mask would
drop, which are half of all, are never computed."""


def attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, *, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the attention of one request in float32.

    query: [new, heads, size]. keys: [length, heads, size]. values: [length, heads, value size]. causal: whether queries
    and keys are of the same tokens (new = length) and each query sees no later key. Returns the output [new, heads,
    value size], of the dtype of `values`, and the log-sum-exp of the scores, float32 [heads, new].
    """
    new, heads, _ = query.shape
    length = len(keys)
    output = values.new_zeros(new, heads, values.shape[-1])
    lse = torch.full((heads, new), -torch.inf, device=query.device)
    if length == 0:
        return output, lse
    block = max(1, min(new, QUERIES, SCORES // length))
    together = max(1, SCORES // (block * length))
    for head in range(0, heads, together):
        chosen = slice(head, head + together)
        q, k, v = (tensor[:, chosen].transpose(0, 1).float() for tensor in (query, keys, values))
        for start in range(0, new, block):
            rows = slice(start, start + block)
            stop = min(start + block, new)
            end = stop if causal else length
            scores = torch.matmul(q[:, rows], k[:, :end].transpose(1, 2)).mul_(scale)
            if causal:
                later = torch.ones(stop - start, stop - start, dtype=torch.bool, device=q.device).triu(1)
                scores[:, :, start:].masked_fill_(later, -torch.inf)
            highest = scores.amax(-1, keepdim=True)
            weights = scores.sub_(highest).exp_()
            total = weights.sum(-1, keepdim=True)
            lse[chosen, rows] = (highest + total.log()).squeeze(-1)
            attended = torch.matmul(weights, v[:, :end]).div_(total)
            output[rows, chosen] = attended.transpose(0, 1).to(output.dtype)
    return output, lse


class K26CPUPrefillBackend(compat.cpu_prefill_backend()):  # type: ignore[misc]
    """vLLM's MLA prefill backend for a CPU, with `attention` in the place of its own product."""

    @staticmethod
    def get_name() -> str:
        """Return the backend's name for vLLM's log."""
        return "K26_CPU_MLA"

    def _ragged_sdpa(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        q_cu_seq_lens: torch.Tensor,
        kv_cu_seq_lens: torch.Tensor,
        causal: bool,
        return_softmax_lse: bool,
    ) -> Any:
        """Compute the attention of several requests, whose tokens follow one another in tensors [tokens, heads, size].

        q_cu_seq_lens, kv_cu_seq_lens: the offset at which each request begins, and that at which the last one ends.
        Returns the output, and with `return_softmax_lse` also the log-sum-exp [heads, tokens].
        """
        queries, lengths = (offsets.diff().tolist() for offsets in (q_cu_seq_lens, kv_cu_seq_lens))
        # The tensors may be padded beyond the last request.
        parts = zip(*(t[: sum(n)].split(n) for t, n in ((q, queries), (k, lengths), (v, lengths))), strict=True)
        found = (attention(new, keys, values, self.scale, causal=causal) for new, keys, values in parts)
        outputs, lses = zip(*found, strict=True)
        return (torch.cat(outputs), torch.cat(lses, dim=1)) if return_softmax_lse else torch.cat(outputs)
