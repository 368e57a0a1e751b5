"""Kimi's tokenizer on the tiktoken library, built from the checkpoint's `tiktoken.model`.

No code of the checkpoint is executed.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import tiktoken

from k26_plugins.common.model.config import K26Config
from k26_plugins.common.prompt.control_tokens import unescape
from k26_plugins.common.prompt.special_tokens import NUM_SPECIAL_TOKENS, special_token_ids

RANKS_FILE = "tiktoken.model"

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
# docs/model.md, 5.1. A run of Han characters is a piece by itself; the classes of letters exclude Han.
SPLIT_PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


# The published tokenizer's limits on the characters that it passes to the library at once, and on a run of characters
# with or without white space; the library fails on a million spaces.
_MAX_CHARS, _MAX_RUN = 400_000, 25_000
_LONG_SPACE = re.compile(rf"\s{{{_MAX_RUN + 1}}}")
_END_OF_RUN = re.compile(rf"\s{{{_MAX_RUN}}}(?=\s)|\S{{{_MAX_RUN}}}(?=\S)")


class TokenizerError(ValueError):
    """A tokenizer that is not this model's. The message names the file or the token, and the remedy."""


class KimiTokenizer:
    """Converts text to token ids and back.

    Examples:
        `tiny_folder` is a checkpoint's folder, here one that `make_tiny` wrote: its ids below 256 are the bytes, and
        `<|im_end|>` is the third special token, as in the published vocabulary.

        >>> tokenizer = KimiTokenizer(tiny_folder)
        >>> tokenizer.encode("Hi!")
        [72, 105, 33]
        >>> tokenizer.encode_prompt("Hi!<|im_end|>")
        [72, 105, 33, 258]
        >>> tokenizer.decode([72, 105, 33, 258])
        'Hi!<|im_end|>'
    """

    def __init__(self, folder: str | Path) -> None:
        """Read `tiktoken.model` of a checkpoint's folder. Raises TokenizerError."""
        ranks = _read_ranks(Path(folder) / RANKS_FILE)
        self.named = special_token_ids(len(ranks))
        first = len(ranks)
        names = {token_id: name for name, token_id in self.named.items()}
        slots = range(first, first + NUM_SPECIAL_TOKENS)
        self.special = {names.get(token_id, f"<|reserved_token_{token_id}|>"): token_id for token_id in slots}
        self.special_ids = frozenset(self.special.values())
        self.vocab_size = first + NUM_SPECIAL_TOKENS
        self._special_pattern = re.compile(f"({'|'.join(map(re.escape, self.special))})")
        self._encoding = tiktoken.Encoding(
            "kimi", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=self.special
        )

    def __deepcopy__(self, memo: object) -> KimiTokenizer:
        """Return the tokenizer itself: it never changes, and engines copy the object that holds it."""
        return self

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, in which the name of a control token stays text."""
        if len(text) <= _MAX_RUN:
            return self._encoding.encode_ordinary(text)
        return [token_id for piece in _pieces(text) for token_id in self._encoding.encode_ordinary(piece)]

    def encode_prompt(self, prompt: str) -> list[int]:
        """Return the token ids of a rendered prompt, in which the name of a control token is the control token.

        Names that `control_tokens.escape` marked stay text.
        """
        token_ids: list[int] = []
        for piece in self._special_pattern.split(prompt):
            token_id = self.special.get(piece)
            if token_id is None:
                token_ids += self.encode(unescape(piece))
            else:
                token_ids.append(token_id)
        return token_ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids; bytes that are not valid UTF-8 become U+FFFD."""
        return self._encoding.decode(list(token_ids))

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token; a control token's bytes are its name."""
        return self._encoding.decode_single_token_bytes(token_id)

    def check(self, config: K26Config) -> None:
        """Raise TokenizerError if the configuration and the tokenizer disagree on the vocabulary's size or on an id."""
        if self.vocab_size != config.text.vocab_size:
            raise TokenizerError(
                f"{RANKS_FILE} gives {self.vocab_size} tokens and config.json {config.text.vocab_size}: "
                f"they are of two models, download both again."
            )
        expected = {
            "[BOS]": config.bos_token_id,
            "[PAD]": config.pad_token_id,
            "<|media_pad|>": config.media_placeholder_token_id,
        }
        for name, token_id in expected.items():
            if self.named[name] != token_id:
                raise TokenizerError(
                    f"{name} is token {self.named[name]} in {RANKS_FILE} and {token_id} in config.json: "
                    f"they are of two models, download both again."
                )


def _pieces(text: str) -> Iterator[str]:
    """Yield the text in pieces that the library can encode.

    The text is cut after every 400,000 characters, and a run of characters with or without white space after every
    25,000.
    """
    for start in range(0, len(text), _MAX_CHARS):
        part = text[start : start + _MAX_CHARS]
        begin = 0
        if max(map(len, part.split()), default=0) > _MAX_RUN or _LONG_SPACE.search(part):
            for end in (match.end() for match in _END_OF_RUN.finditer(part)):
                yield part[begin:end]
                begin = end
        yield part[begin:]


def _read_ranks(file: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    try:
        for line in file.read_bytes().splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except OSError as error:
        raise TokenizerError(f"{file} cannot be read ({error.strerror}): download it with the checkpoint.") from error
    except (ValueError, binascii.Error) as error:
        raise TokenizerError(f"{file} is damaged ({error}): download it again.") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or not ranks:
        raise TokenizerError(f"{file} is damaged: its {len(ranks)} ranks are not 0 to {len(ranks) - 1}.")
    return ranks
