"""Tests of answers that are held to a grammar: what each of SGLang's grammar backends allows with the model's
tokenizer, and what the server answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.grammar import CASES, CHOICES, is_valid, tokens, walk
from support.served_grammar import ServedGrammarTests

from k26_plugins.common.prompt.tokenizer import KimiTokenizer
from k26_plugins.sglang import compat, register

pytest.importorskip("sglang.srt.runtime_context", reason="backends are made of the context that came after 0.5.10")
VOCABULARY = 512


@pytest.fixture(scope="module")
def plain(tiny_folder: Path) -> KimiTokenizer:
    return KimiTokenizer(tiny_folder)


@pytest.fixture(scope="module", params=["xgrammar", "llguidance", "outlines"])
def backend(tiny_folder: Path, plain: KimiTokenizer, request: pytest.FixtureRequest) -> Iterator[Any]:
    """Yield the grammar backend that the scheduler makes from the flag."""
    from sglang.srt.constrained import base_grammar_backend
    from sglang.srt.runtime_context import get_context

    register()
    tokenizer = compat.get_tokenizer(str(tiny_folder), None)
    # The context's arguments name a model that would be looked for on the hub.
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with get_context().override_server_args(grammar_backend=request.param, device="cpu") as arguments:
        make = base_grammar_backend.create_grammar_backend
        yield make(arguments, tokenizer, VOCABULARY, {plain.special["<|im_end|>"]})
    monkeypatch.undo()


def grammar(backend: Any, kind: str, spec: Any) -> Any:
    """Return the compiled grammar, asked for as SGLang's grammar manager does."""
    kinds = {"json": ("json", json.dumps(spec)), "choice": ("regex", "|".join(CHOICES)), "regex": ("regex", spec)}
    future, _ = backend.get_cached_or_future_value(kinds.get(kind, (kind, spec)), False)
    return future.result()


def allowed(found: Any) -> list[int]:
    mask = found.allocate_vocab_mask(VOCABULARY, 1, "cpu")
    if mask.dtype == torch.bool:
        found.fill_vocab_mask(mask, 0)
        return [token for token in range(VOCABULARY) if not mask[0, token]]
    mask.fill_(-1)
    found.fill_vocab_mask(mask, 0)
    return tokens(mask[0])


@pytest.mark.parametrize("kind", CASES)
def test_whatever_is_allowed_is_valid(backend: Any, plain: KimiTokenizer, kind: str) -> None:
    """An answer drawn from what the grammar allows is valid, and ends with the token with which the model ends
    answers."""
    end = plain.special["<|im_end|>"]
    for seed in range(8):
        found = grammar(backend, kind, CASES[kind])
        *answer, last = walk(partial(allowed, found), found.accept_token, {end}, seed)
        assert last == end
        assert max(answer) < 256, "a control token in the answer"
        text = plain.decode(answer)
        assert is_valid(kind, text), text


class TestServed(ServedGrammarTests):
    reasoning = "reasoning_content"

    def asked(self, kind: str, spec: Any) -> dict[str, Any]:
        return {"regex": "|".join(spec) if kind == "choice" else spec}
