"""Encoding and streaming decoding: the tokenizer that the engines get against the tiktoken library, in one run.

    python kernels/bench/tokenizer.py FOLDER      with a checkpoint's tiktoken.model, or the one of `k26 tiny`

Made-up ranks, as `k26 tiny --vocab-size 163840` has, make other tokens of a text than the model's: such figures compare
the two only.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tokenizers.decoders import DecodeStream

from k26_plugins.common.prompt.hf_tokenizer import load_hf_tokenizer
from k26_plugins.common.prompt.tokenizer import KimiTokenizer

TEXT = (
    "The quick brown fox's 1234567 jumps over the lazy dog; naïve café — 中文和English混合的句子，有标点。\n"
    "def f(x: int) -> int:\n\treturn x * 2  # 🙂 comment\n"
) * 400
RUNS = 7


def rate(count: int, function: Callable[[], object]) -> float:
    """Tokens in a second, of the fastest run."""
    best = float("inf")
    for _ in range(RUNS):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return count / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    fast, plain = load_hf_tokenizer(folder), KimiTokenizer(folder)
    token_ids = plain.encode(TEXT)
    if fast.encode(TEXT, add_special_tokens=False) != token_ids:
        raise SystemExit("the two tokenizers give different ids.")

    def stream() -> Iterator[str | None]:
        decoder = DecodeStream(skip_special_tokens=True)
        return (decoder.step(fast._tokenizer, token_id) for token_id in token_ids)

    figures = {
        "encode, engines' tokenizer": rate(len(token_ids), lambda: fast.encode(TEXT, add_special_tokens=False)),
        "encode, tiktoken": rate(len(token_ids), lambda: plain.encode(TEXT)),
        "decode token by token, engines' tokenizer": rate(len(token_ids), lambda: list(stream())),
    }
    for name, value in figures.items():
        print(f"{name:44} {value:12,.0f} tokens/s")


if __name__ == "__main__":
    main()
