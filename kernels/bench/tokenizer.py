"""Compare the core's tokenizer with the engines' own in one run: encoding, and decoding of streams.

    python kernels/bench/tokenizer.py FOLDER [--save]      with a checkpoint's tiktoken.model

The core's rivals are those that the environment has: transformers' conversion of the file, which both engines load if
they run no remote code, and vLLM's tiktoken tokenizer for Kimi-Audio, which reads the same file. Streams go through the
engine's own code token by token: vLLM's detokenizer for one request, or SGLang's for 64 requests at once. Without an
engine, the DecodeStream of the tokenizers library is used.

The file of `k26 tiny --vocab-size 163840` has made-up ranks, with which every byte of a text is a token. To measure
without the published file, put other ranks into the folder's tiktoken.model.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.kept import keep, machine
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer

from k26_plugins.common.prompt.control_tokens import escape
from k26_plugins.common.prompt.hf_tokenizer import load_hf_tokenizer
from k26_plugins.common.prompt.tokenizer import KimiTokenizer

PARAGRAPH = (
    "The quick brown fox's 1234567 jumps over the lazy dog; naïve café — 中文和English混合的句子，有标点。\n"
    "def f(x: int) -> int:\n\treturn x * 2  # 🙂 comment\n"
)
TEXTS = {"a chat turn, 0.8 kB": PARAGRAPH * 4, "a document, 160 kB": PARAGRAPH * 800}
RUNS = 7
REQUESTS = 64


def rate(count: int, function: Callable[[], object], runs: int = RUNS) -> float:
    """Return tokens a second in the fastest of several runs. count: tokens of one run."""
    best = float("inf")
    for _ in range(runs):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return count / best


def rivals(folder: Path) -> dict[str, Any]:
    """Return the tokenizers that this environment has for the folder's file, by name, the core's among them."""
    found: dict[str, Any] = {"core": load_hf_tokenizer(folder)}
    found["transformers"] = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if find_spec("vllm") is not None:
        from vllm.tokenizers.hf import get_cached_tokenizer

        found = {name: get_cached_tokenizer(tokenizer) for name, tokenizer in found.items()}
        from vllm.tokenizers.kimi_audio import KimiAudioTokenizer

        found["vllm kimi_audio"] = KimiAudioTokenizer.from_pretrained(folder)
    return found


def encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    """Return the function that encodes a text, without special tokens around it."""
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


def stream(tokenizer: Any, token_ids: list[int]) -> tuple[str, Callable[[], str]]:
    """Return whose code decodes a stream, and the function that decodes one answer with it, token by token."""
    if find_spec("vllm") is not None:
        return "vLLM's detokenizer", lambda: "".join(vllm_pieces(tokenizer, token_ids))
    if find_spec("sglang") is not None:
        return f"SGLang's detokenizer, {REQUESTS} at once", lambda: "".join(sglang_pieces(tokenizer, token_ids))

    def pieces() -> Iterator[str]:
        decoder = DecodeStream(skip_special_tokens=True)
        for token_id in token_ids:
            yield decoder.step(tokenizer._tokenizer, token_id) or ""

    return "DecodeStream", lambda: "".join(pieces())


def vllm_pieces(tokenizer: Any, token_ids: list[int]) -> Iterator[str]:
    """Yield the pieces of text that vLLM's detokenizer gives for an answer, token by token."""
    from vllm import SamplingParams
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer

    request: Any = SimpleNamespace(
        request_id="0", prompt_token_ids=[0], prompt_embeds=None, sampling_params=SamplingParams()
    )
    detokenizer = IncrementalDetokenizer.from_new_request(tokenizer, request)
    for token_id in token_ids:
        detokenizer.update([token_id], False)
        yield detokenizer.get_next_output_text(False, True)
    yield detokenizer.get_next_output_text(True, True)


def sglang_pieces(tokenizer: Any, token_ids: list[int]) -> Iterator[str]:
    """Yield the pieces of text that SGLang's detokenizer gives for the first of REQUESTS answers of the same tokens."""
    from sglang.srt.managers.detokenizer_manager import DetokenizerManager

    manager: Any = DetokenizerManager.__new__(DetokenizerManager)
    manager.tokenizer, manager.vocab_size, manager.decode_status = tokenizer, len(tokenizer), {}
    manager.disable_tokenizer_batch_decode = manager.is_tool_call_parser_gpt_oss = False
    same: dict[str, list[Any]] = {
        "rids": [str(number) for number in range(REQUESTS)],
        "decoded_texts": [""] * REQUESTS,
        "read_offsets": [0] * REQUESTS,
        "no_stop_trim": [False] * REQUESTS,
        "skip_special_tokens": [True] * REQUESTS,
        "spaces_between_special_tokens": [True] * REQUESTS,
        "finished_reasons": [None] * REQUESTS,
    }
    for token_id in token_ids:
        batch: Any = SimpleNamespace(**same, decode_ids=[[token_id] for _ in range(REQUESTS)])
        yield manager._decode_batch_token_id_output(batch)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ranks", default="of the folder", help="what the ranks are, for the saved results")
    parser.add_argument("--save", action="store_true", help="write the results beside this file, named by date and CPU")
    arguments = parser.parse_args()
    here = machine()
    plain, found = KimiTokenizer(arguments.folder), rivals(arguments.folder)
    results = []

    def with_offsets(text: str) -> list[int]:
        return found["core"](text, add_special_tokens=False, return_offsets_mapping=True)["input_ids"]

    def of_core(marked: str, _: str) -> list[int]:
        return encoder(found["core"])(marked)

    def measured(what: str, who: str, tokens_per_second: float, note: str) -> None:
        results.append({"what": what, "who": who, "tokens_per_second": round(tokens_per_second), "note": note})
        print(f"{what:44} {who:16} {tokens_per_second:12,.0f} tokens/s  {note}")

    for what, text in TEXTS.items():
        token_ids = plain.encode(text)
        functions = {name: encoder(tokenizer) for name, tokenizer in found.items()}
        marked = escape(text)
        functions["core, marked"] = partial(of_core, marked)
        functions["core, with offsets"] = with_offsets
        for who, encode in functions.items():
            same = encode(text) == token_ids
            if who.startswith("core") and not same:
                raise SystemExit(f"{who}: other ids than the tiktoken library's.")
            speed = rate(len(token_ids), partial(encode, text))
            measured(f"encode {what}", who, speed, "" if same else "other ids")
    text = TEXTS["a document, 160 kB"][:20_000]
    token_ids = plain.encode(text)
    for who, tokenizer in found.items():
        with contextlib.suppress(AttributeError):
            code, function = stream(tokenizer, token_ids)
            many = REQUESTS if "at once" in code else 1
            right = function() == text
            measured(f"stream, {code}", who, many * rate(len(token_ids), function, 3), "" if right else "other text")
    if arguments.save:
        engine = "vllm" if find_spec("vllm") else "sglang" if find_spec("sglang") else "core"
        keep(f"tokenizer-{engine}", {"machine": here, "ranks": arguments.ranks, "results": results})


if __name__ == "__main__":
    main()
