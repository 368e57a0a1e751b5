"""Tests of answers that are drawn at random with speculative decoding on a CPU, by vLLM's own rejection sampler."""

from __future__ import annotations

import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.platforms import current_platform

from k26_plugins.vllm.guesses import repeated

if not hasattr(current_platform, "register_triton_kernel_overrides"):
    pytest.skip("this vLLM's sampler of guesses does not run on a CPU", allow_module_level=True)

from vllm.triton_utils import dispatcher
from vllm.v1.sample import rejection_sampler


class OwnModules:
    """`sys.modules` with vLLM's modules alone. vLLM's registration looks at all modules, and some modules that other
    tests import have no plain `__dict__`."""

    def __getitem__(self, name: str) -> Any:
        return sys.modules[name]

    def values(self) -> list[Any]:
        return [module for name, module in sys.modules.items() if name.startswith("vllm.")]


TEMPERATURES = (0.5, 1.0, 2.0)
TOKENS, DRAWN = 6, 20_000


@pytest.fixture(autouse=True)
def _mended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "sys", SimpleNamespace(modules=OwnModules()))
    current_platform.register_triton_kernel_overrides()
    hooked = partial(repeated, rejection_sampler.expand_batch_to_tokens)
    monkeypatch.setattr(rejection_sampler, "expand_batch_to_tokens", hooked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64])
def test_each_guess_has_its_requests_value(dtype: torch.dtype) -> None:
    values, ends = torch.tensor([3, 0, 7, 9], dtype=dtype), torch.tensor([2, 3, 3, 6], dtype=torch.int32)
    found = rejection_sampler.expand_batch_to_tokens(values, ends, 6, replace_from=0, replace_to=1)
    assert found.dtype == dtype
    # The third request has no guesses.
    assert found.tolist() == [3, 3, 1, 9, 9, 9]


def drawn_at(temperature: torch.Tensor) -> Any:
    """Return what vLLM's sampler reads of requests that set nothing but a temperature."""
    return SimpleNamespace(
        temperature=temperature, all_greedy=False, all_random=True, top_k=None, top_p=None, generators={}
    )


def test_tokens_are_drawn_as_the_model_has_them() -> None:
    """Whatever the guesses are, a token is drawn as often as its probability at the request's temperature says."""
    torch.manual_seed(0)
    logits = torch.randn(TOKENS)
    temperature = torch.tensor(TEMPERATURES).repeat_interleave(DRAWN)
    guesses = torch.randint(TOKENS, (len(temperature),), dtype=torch.int32)
    ends = torch.arange(1, len(temperature) + 1, dtype=torch.int32)
    sampling = drawn_at(temperature)
    target = rejection_sampler.apply_sampling_constraints(logits.repeat(len(temperature), 1), ends, sampling)
    after = torch.zeros(len(temperature), 1, dtype=torch.int32)
    counts = [1] * len(temperature)
    drawn = rejection_sampler.rejection_sample(guesses, counts, 1, ends, None, target, after, sampling)[:, 0]
    for number, value in enumerate(TEMPERATURES):
        expected = (logits / value).softmax(0)
        found = drawn[number * DRAWN : (number + 1) * DRAWN].bincount(minlength=TOKENS) / DRAWN
        assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / DRAWN).sqrt()).all(), value
