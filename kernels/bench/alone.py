"""Measure what the plugin costs vLLM: the same requests go to servers with the plugin and without it, in turns.

    python kernels/bench/alone.py [--save]         in vLLM's environment

No engine serves the published INT4 experts on a CPU by itself. The checkpoint is therefore tiny and has bfloat16
experts of the same values, which vLLM does serve by itself: one server has no plugin (the bf16 baseline), and one has
the plugin. A third server has the plugin and the INT4 experts. The model is so small that most of the time is what the
engine does around the model, which is where the cost of a plugin would show.

There is no such run for SGLang. Without the plugin, SGLang 0.5.23 starts only with the checkpoint's own code for
images, and with a stand-in for this code its plain torch attention fails at the first prompt of this model, on a CPU
without AMX ("Expected size for first two dimensions of batch2 tensor to be: [4, 192] but got: [4, 576]").

All servers are up at the same time and are asked one after the other, in each possible order in turn. Each time is
divided by the baseline's time in the same turn. Shown are the median of these ratios, the interval that holds the
median in 95 of 100 runs, and the ratio of all CPU seconds of the servers' processes, which other work on the machine
changes less.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import permutations
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
import httpx
import psutil
from bench.kept import keep, machine
from bench.swarm import PARSERS, say_letters, with_bfloat16_experts
from httpx_sse import EventSource
from support.images import image_part, png, random_image
from support.server import Server
from support.vllm_server import serve

from k26_plugins.common.tiny.checkpoint import make_tiny
from k26_plugins.operate.swarm.memory import processes

ALONE, OURS, INT4 = "alone", "plugin", "plugin, INT4"
OFF = {"VLLM_PLUGINS": "none"}
# Every server is started without torch.compile: compiling for three servers would take longer than the whole
# measurement.
COMMON = "--enforce-eager"


def letters(count: int, seed: int) -> str:
    """Return random letters, each of which is a token of the tiny tokenizer."""
    return "".join(random.Random(seed).choices("abcdefghijklmnopqrstuvwxyz ", k=count))


def ask(server: Server, content: Any, answer: int, *, stream: bool = False) -> int:
    """Ask for an answer of `answer` tokens, and return the total number of tokens in prompt and answer."""
    body: dict[str, Any] = {"max_tokens": answer, "temperature": 0, "ignore_eos": True}
    if not stream:
        return int(server.chat(content, **body)["usage"]["total_tokens"])
    body |= {"model": server.model, "messages": [{"role": "user", "content": content}]}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=120) as done:
        done.raise_for_status()
        chunks = [event.data for event in EventSource(done).iter_sse() if event.data != "[DONE]"]
    return int(json.loads(chunks[-1])["usage"]["total_tokens"])


def at_once(server: Server, prompts: list[str]) -> int:
    """Ask all prompts at the same time, each for an answer of 32 tokens, and return the total number of tokens."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        return sum(pool.map(lambda prompt: ask(server, prompt, 32), prompts))


def pictures(seed: int, count: int) -> Asking:
    """Return a request with `count` images, which differ for every seed."""
    parts = [image_part(png(random_image(640, 480, count * seed + index))) for index in range(count)]
    return partial(ask, content=[*parts, {"type": "text", "text": "What?"}], answer=1)


Asking = Callable[[Server], int]
REQUESTS: dict[str, Callable[[int], Asking]] = {
    "a prompt of 2,000 tokens": lambda seed: partial(ask, content=letters(2000, seed), answer=1),
    "an answer of 100 tokens": lambda seed: partial(ask, content=letters(20, seed), answer=100),
    "the same, streamed": lambda seed: partial(ask, content=letters(20, seed), answer=100, stream=True),
    "8 at once, 200 tokens in, 32 out": lambda seed: partial(
        at_once, prompts=[letters(200, 8 * seed + index) for index in range(8)]
    ),
    "an image of 640×480": lambda seed: pictures(seed, 1),
    "4 images of 640×480": lambda seed: pictures(seed, 4),
}
"""For each kind of request, the function that makes it from a seed.

The seed is new in each turn, so that nothing is found in a cache.
"""


@dataclass
class Times:
    """How long one kind of request took on one server."""

    seconds: list[float] = field(default_factory=list)
    """Elapsed time of each turn."""
    of_cores: float = 0
    """CPU seconds of all of the server's processes, over all turns."""


def of_cores(pid: int) -> float:
    """Return the CPU seconds that a server's processes have taken so far, including children that have ended."""
    total = 0.0
    for process in processes(pid):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def measure(servers: dict[str, Server], turns: int) -> dict[str, dict[str, Times]]:
    """Return the times by kind of request and server.

    Raises SystemExit if the servers count different numbers of tokens for the same request.
    """
    found = {kind: {name: Times() for name in servers} for kind in REQUESTS}
    # What a server still does after its answer slows the server that is asked next. The order changes with every turn,
    # so that this does not always fall on the same server.
    orders = list(permutations(servers))
    # The first two turns are not counted: in them, code is compiled and memory allocated that later turns use.
    for turn in range(-2, turns):
        for kind, request in REQUESTS.items():
            counts = set()
            ask_one = request(1000 + turn)
            for name in orders[turn % len(orders)]:
                server, times = servers[name], found[kind][name]
                cores, start = of_cores(server.pid), time.perf_counter()
                counts.add(ask_one(server))
                if turn >= 0:
                    times.seconds.append(time.perf_counter() - start)
                    times.of_cores += of_cores(server.pid) - cores
            if len(counts) != 1:
                raise SystemExit(f"{kind}: the servers count other tokens: {counts}. No times are shown.")
    return found


def compared(times: dict[str, Times], name: str) -> dict[str, float | list[float]]:
    """Return a server's times divided by those of the engine alone, the bf16 baseline."""
    pairs = zip(times[name].seconds, times[ALONE].seconds, strict=True)
    ratios = sorted(ours / alone for ours, alone in pairs)
    # Indices of the interval's ends among the sorted ratios, by the normal approximation of the binomial distribution.
    half = 0.98 * len(ratios) ** 0.5
    low, high = max(0, int(len(ratios) / 2 - half)), min(len(ratios) - 1, int(len(ratios) / 2 + half))
    return {
        "median_ratio": round(median(ratios), 3),
        "interval": [round(ratios[low], 3), round(ratios[high], 3)],
        "cores_ratio": round(times[name].of_cores / times[ALONE].of_cores, 3),
        "median_ms_alone": round(1e3 * median(times[ALONE].seconds), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=24, help="how often each server is asked (default: 24)")
    parser.add_argument("--save", action="store_true", help="write the results beside this file, named by date and CPU")
    arguments = parser.parse_args()
    here = machine()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        make_tiny(folder / "int4")
        say_letters(folder / "int4")
        with_bfloat16_experts(folder / "int4", folder / "bf16")
        # Only the engine alone needs the flags for parsers: with the plugin they are the default.
        ways = {ALONE: ("bf16", PARSERS, OFF), OURS: ("bf16", (), {}), INT4: ("int4", (), {})}
        servers = {}
        for way, (checkpoint, flags, settings) in ways.items():
            log = folder / f"{way}.log"
            servers[way] = stack.enter_context(serve(folder / checkpoint, log, COMMON, *flags, **settings))
            if ("k26-plugins" in log.read_text()) != (way != ALONE):
                raise SystemExit(f"{way}: the log does not say what was to be served with. No times are shown.")
        times_of = measure(servers, arguments.turns)
    results = {kind: {way: compared(times, way) for way in (OURS, INT4)} for kind, times in times_of.items()}
    for kind, ratios in results.items():
        print(kind)
        for way, ratio in ratios.items():
            print(f"    {way:14}", "  ".join(f"{what} {value}" for what, value in ratio.items()))
    if arguments.save:
        found = {"machine": here, "vllm": version("vllm"), "turns": arguments.turns, "results": results}
        keep("alone-vllm", found)


if __name__ == "__main__":
    main()
