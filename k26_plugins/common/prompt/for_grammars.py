"""Show the tokenizer to grammar compilers with the model's own end token and without most control tokens.

Grammar compilers ask a tokenizer for its vocabulary and for the token that ends an answer. The published tokenizer's
end token is `[EOS]`, with which this model ends no answer, and its control tokens look like ordinary words. A grammar
compiled from these allows `<|im_end|>` inside a string, where it ends the answer in the middle; and where the answer
may end, it allows only `[EOS]`, so that of the choices `red` and `reddish` the model could not choose the shorter.
"""

from __future__ import annotations

import copy
from typing import Any

from k26_plugins.common.prompt.output import MARKERS

END = "<|im_end|>"


class _SeenByGrammars:
    """The attributes that grammar compilers read.

    The class of the tokenizer's copy has this class as its first base, before the tokenizer's own class.
    """

    _words: dict[str, int]
    _end: int

    eos_token = END

    @property
    def eos_token_id(self) -> int:
        return self._end

    def get_vocab(self) -> dict[str, int]:
        return self._words


def for_grammars(tokenizer: Any) -> Any:
    """Return a copy of the core's tokenizer for grammar compilers; return any other tokenizer as it is.

    The copy's end token is `<|im_end|>`. Its vocabulary has no control tokens except the markers of thinking and of
    tool calls, which the grammars of calls contain.
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
