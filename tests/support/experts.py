"""Expert weights, inputs, and the float64 judge that the backends are held to: nothing of the core computes in it."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

from k26_plugins.common.experts import BACKENDS, ExpertWeights
from k26_plugins.common.model.int4 import quantize


def make_weights(num_experts: int, hidden: int, inner: int, seed: int = 0) -> ExpertWeights:
    generator = torch.Generator().manual_seed(seed)
    w13 = torch.randn(num_experts, 2 * inner, hidden, generator=generator) / hidden**0.5
    w2 = torch.randn(num_experts, hidden, inner, generator=generator) / inner**0.5
    return ExpertWeights(*quantize(w13), *quantize(w2))


def dense(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    shape = torch.Size((packed.shape[0], packed.shape[1] * 8))
    return unpack_from_int32(packed, 4, shape).double() * scale.double().repeat_interleave(32, dim=1)


def judge(weights: ExpertWeights, x: torch.Tensor, ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
    """The definition, token by token, in float64."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(len(x)):
        for index, weight in zip(ids[token].tolist(), topk_weights[token].double(), strict=True):
            if index < 0:
                continue
            expert = weights.expert(index)
            gate, up = (dense(expert.w13_packed, expert.w13_scale) @ x[token].double()).chunk(2)
            out[token] += weight * (dense(expert.w2_packed, expert.w2_scale) @ (F.silu(gate) * up))
    return out


def route(num_tokens: int, top_k: int, num_experts: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(num_experts, generator=generator)[:top_k] for _ in range(num_tokens)])
    return ids.to(torch.int32), torch.rand(num_tokens, top_k, generator=generator) + 0.1


def inputs(num_tokens: int, hidden: int) -> torch.Tensor:
    return torch.randn(num_tokens, hidden, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result.double() - expected).norm() / expected.norm()).item()


def to_device(weights: ExpertWeights, device: torch.device) -> ExpertWeights:
    """A copy on the device."""
    tensors = (weights.w13_packed, weights.w13_scale, weights.w2_packed, weights.w2_scale)
    return ExpertWeights(*(tensor.to(device, copy=True) for tensor in tensors))


LENT: list[np.ndarray] = []  # never given back to the system, which would end the process at a read


def overwritten_when_let_go(weights: ExpertWeights) -> ExpertWeights:
    """A copy in memory that is filled with other bytes, and never given back, once no tensor uses it.

    What still reads from there, by an address that it kept, computes something else.
    """

    def lend(tensor: torch.Tensor) -> torch.Tensor:
        memory = tensor.contiguous().view(torch.uint8).flatten().numpy().copy()
        LENT.append(memory)
        lent = memory.view()  # what torch holds while a tensor is there
        weakref.finalize(lent, memory.fill, 0x3C)
        return torch.from_numpy(lent).view(tensor.dtype).view(tensor.shape)

    return ExpertWeights(
        *(lend(tensor) for tensor in (weights.w13_packed, weights.w13_scale, weights.w2_packed, weights.w2_scale))
    )


def backends() -> list[object]:
    """Every backend as a test's parameter; one that this machine cannot run is skipped for the reason it gives."""
    weights = make_weights(1, 128, 64)
    reasons = {name: backend.unsupported(weights) for name, backend in sorted(BACKENDS.items())}
    return [
        pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=f"{name}: {reason}"))
        for name, reason in reasons.items()
    ]
