"""Checks what a grammar allows an answer to be, by random walks through an engine's grammar backends.

Python's `re`, jsonschema and xgrammar itself judge the answers.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

import jsonschema
import torch
import xgrammar

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "days": {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3},
        "wet": {"enum": ["yes", "no", "grün"]},
    },
    "required": ["city", "days", "wet"],
    "additionalProperties": False,
}
# The second choice goes on where the first may end, and the third has a character of two bytes.
CHOICES = ["red", "reddish", "grün"]
REGEX = "[a-z]{2,5}é[0-9]{1,3}"
# A regular expression of the characters with which control tokens are spelled.
NAMES = "[a-z0-9<|>_]{40}"
CASES = {"json": SCHEMA, "choice": CHOICES, "regex": REGEX}


def liking(special: dict[str, int], liked: dict[str, int]) -> dict[str, int]:
    """Return a request's `logit_bias` that holds `liked`, the bias by control token.

    The tokens that end an answer and the bytes above 127 are made unlikely, so that they come only where nothing else
    is allowed, or where `liked` says otherwise.
    """
    named = {special[name]: bias for name, bias in {"[EOS]": -100, "<|im_end|>": -100, **liked}.items()}
    return {str(token): bias for token, bias in {**dict.fromkeys(range(128, 256), -100), **named}.items()}


def is_valid(kind: str, text: str) -> bool:
    """Return whether an answer is as its kind of CASES asks, by the standard library and jsonschema."""
    if kind == "choice":
        return text in CHOICES
    if kind == "regex":
        return re.fullmatch(REGEX, text) is not None
    try:
        # Some backends let unescaped control characters into strings.
        jsonschema.validate(json.loads(text, strict=False), SCHEMA)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def tokens(bitmask: torch.Tensor) -> list[int]:
    """Return the token ids that a row of an int32 bitmask allows; each number of the row holds 32 tokens."""
    return (bitmask[:, None] >> torch.arange(32) & 1).flatten().nonzero().flatten().tolist()


def walk(
    allowed: Callable[[], list[int]],
    accept: Callable[[int], None],
    ends: set[int],
    seed: int,
    *,
    control_tokens_first: bool = False,
) -> list[int]:
    """Return the token ids of an answer, each drawn from those that the grammar allows, up to the first of `ends`.

    Bytes above 127 are drawn only where nothing else is allowed, since backends let some into strings where they form
    no character. control_tokens_first: draw a control token wherever the grammar allows one; the grammars of calls
    allow a marker also to be spelled with ordinary tokens, which would be text.
    """
    rng, token_ids = random.Random(seed), list[int]()
    while not ends.intersection(token_ids):
        assert len(token_ids) < 2000, token_ids
        found = allowed()
        choices = [token for token in found if not 127 < token < 256] or found
        controls = [token for token in choices if token > 255] if control_tokens_first else []
        token_ids.append(rng.choice(controls or choices))
        accept(token_ids[-1])
    return token_ids


def accepts(structural_tag: dict[str, Any], text: str) -> bool:
    """Return whether xgrammar accepts `text` as a whole answer under the structural tag."""
    info = xgrammar.TokenizerInfo([bytes([byte]) for byte in range(256)] + [b"</s>"], stop_token_ids=[256])
    compiled = xgrammar.GrammarCompiler(info).compile_structural_tag(json.dumps(structural_tag))
    matcher = xgrammar.GrammarMatcher(compiled)
    return matcher.accept_string(text) and matcher.accept_token(256)
