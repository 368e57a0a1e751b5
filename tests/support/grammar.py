"""What a grammar of an answer lets through: xgrammar as the judge, which both engines use."""

from __future__ import annotations

import json
from typing import Any

import xgrammar


def accepts(structural_tag: dict[str, Any], text: str) -> bool:
    """Whether a whole answer may be `text`."""
    info = xgrammar.TokenizerInfo([bytes([byte]) for byte in range(256)] + [b"</s>"], stop_token_ids=[256])
    compiled = xgrammar.GrammarCompiler(info).compile_structural_tag(json.dumps(structural_tag))
    matcher = xgrammar.GrammarMatcher(compiled)
    return matcher.accept_string(text) and matcher.accept_token(256)
