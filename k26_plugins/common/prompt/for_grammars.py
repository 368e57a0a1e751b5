"""The tokenizer as compilers of grammars are to see it, which ask for its vocabulary and the token that ends an answer.

The published tokenizer's own end is `[EOS]`, with which this model ends no answer, and its control tokens are words like
others. A grammar made of that lets `<|im_end|>` stand in a string, where it ends the answer in the middle, and where the
answer may end it allows `[EOS]` alone: of the choices `red` and `reddish` the model could not choose the shorter.
"""

from __future__ import annotations

import copy
from typing import Any

from k26_plugins.common.prompt.output import MARKERS

END = "<|im_end|>"


class _SeenByGrammars:
    """What grammars' compilers see. The class of a tokenizer's copy has this as a base, before the tokenizer's own
    class."""

    _words: dict[str, int]
    _end: int

    eos_token = END

    @property
    def eos_token_id(self) -> int:
        return self._end

    def get_vocab(self) -> dict[str, int]:
        return self._words


def for_grammars(tokenizer: Any) -> Any:
    """A copy of the core's tokenizer for compilers of grammars; any other tokenizer is returned as it is.

    It ends an answer with `<|im_end|>`. Of the control tokens its vocabulary has the markers of thinking and of tool calls,
    which grammars of calls spell; the others are in no grammar.
    """
    plain = getattr(tokenizer, "plain", None)
    if plain is None:
        return tokenizer
    left_out = set(plain.special) - set(MARKERS)
    seen = copy.copy(tokenizer)
    seen._words = {word: token_id for word, token_id in tokenizer.get_vocab().items() if word not in left_out}
    seen._end = plain.special[END]
    seen.__class__ = type("TokenizerForGrammars", (_SeenByGrammars, type(seen)), {})
    return seen
