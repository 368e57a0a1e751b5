"""Computes MLA on SGLang's plain torch backend for the queries of the new tokens only.

For every extension the in-tree backend computes the queries of the whole prefix again. It also holds heads × length²
scores in float32, because torch has no fused attention for keys and values of two sizes. Absorbed MLA has one head of
keys for all heads of queries, and its values are the first columns of the keys (DeepSeek-V2, arXiv 2405.04434, section
2.1). So this module makes the heads rows of one fused attention with the keys as values, and drops the last columns of
its output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from k26_plugins.sglang import compat

MASK_ELEMENTS = 2**24
"""The largest number of elements of the mask in one call of the fused attention. It bounds the memory that an extension
needs besides the KV cache."""


def absorbed_attention(query: torch.Tensor, latent: torch.Tensor, value_size: int, scale: float) -> torch.Tensor:
    """Compute the causal attention of a sequence's last tokens.

    query: [new, heads, size]. latent: [length, size] of the same dtype; its last `new` rows are those of the queries'
    own tokens. Returns [new, heads, value_size].
    """
    new, heads, size = query.shape
    length = len(latent)
    keys = latent[None, None]
    output = query.new_empty(new, heads, value_size)
    block = max(1, MASK_ELEMENTS // (length * heads))
    for start in range(0, new, block):
        stop = min(start + block, new)
        end = length - new + stop
        mask = None
        if stop - start > 1:
            seen = torch.arange(length - new + start, end, device=query.device).repeat_interleave(heads)
            mask = torch.arange(end, device=query.device) <= seen[:, None]
        rows = query[start:stop].reshape(1, 1, -1, size)
        attended = scaled_dot_product_attention(rows, keys[:, :, :end], keys[:, :, :end], attn_mask=mask, scale=scale)
        output[start:stop] = attended.view(-1, heads, size)[..., :value_size]
    return output


class K26TorchNativeAttnBackend(compat.torch_native_backend()):  # type: ignore[misc]
    """The in-tree backend with `absorbed_attention` in the place of its products for extensions and for decodes.

    Both methods are called as the in-tree backend calls its own, so the parameters keep their names and order.
    """

    def get_cpu_graph_seq_len_fill_value(self) -> int:
        """Return the length of the requests by which SGLang pads a batch; the in-tree backend does not define it.

        SGLang pads batches so that all ranks of data-parallel attention have as many requests.
        """
        return 1

    def _run_sdpa_forward_extend(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        extend_prefix_lens: torch.Tensor,
        extend_seq_lens: torch.Tensor,
        *_: Any,
        scaling: float,
        **__: Any,
    ) -> torch.Tensor:
        """Compute an extension of several requests, whose new tokens follow one another.

        query: [tokens, heads, size]. k_cache: [slots, 1, size]. Writes and returns output: [tokens, heads, value size].
        """
        start = 0
        for request, length, new in zip(
            req_pool_indices.tolist(), seq_lens.tolist(), extend_seq_lens.tolist(), strict=True
        ):
            latent = k_cache[req_to_token[request, :length], 0].to(query.dtype)
            rows = slice(start, start + new)
            output[rows] = absorbed_attention(query[rows], latent, v_cache.shape[-1], scaling)
            start += new
        return output

    def _run_sdpa_forward_decode(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        *_: Any,
        scaling: float,
        **__: Any,
    ) -> torch.Tensor:
        """Compute a decode of several requests, which is an extension of each by one token."""
        one = torch.ones_like(seq_lens)
        return self._run_sdpa_forward_extend(
            query,
            output,
            k_cache,
            v_cache,
            req_to_token,
            req_pool_indices,
            seq_lens,
            seq_lens - one,
            one,
            scaling=scaling,
        )
