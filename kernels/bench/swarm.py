"""Test vLLM on this machine under the load of an agent swarm: beside the bf16 baseline, and with growing work.

    cd kernels && python -m bench.swarm peer --python VLLM_ENV/bin/python [--save]
    cd kernels && python -m bench.swarm sweep --python VLLM_ENV/bin/python [--save]

`peer` serves one tiny checkpoint in two ways, in turns within one run: in the published layout (INT4) with the plugin,
and with bfloat16 experts of the same values by vLLM alone (the bf16 baseline), since vLLM has no INT4 experts on a CPU.
The same seed sends the same messages to both. Without the plugin, tools are rendered as JSON, so those prompts are
longer.

`sweep` lets the agents' turns, the number of agents and the shared prefix grow, each of them by itself. Each growth is
given as the exponent of seconds over size. All runs are compared with one cost model, which has a cost for each
request, and a cost for each pair of a computed token (one not found in the prefix cache) and a token of its context:
the work of attention.

`--save` writes JSON and a plot into results/. `k26` runs from this environment, vLLM from that of `--python`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from bench.kept import keep, machine
from safetensors.torch import load_file, save_file

from k26_plugins.common.checkpoint import Checkpoint
from k26_plugins.common.checkpoint.header import INDEX_FILE
from k26_plugins.common.model.int4 import dequantize
from k26_plugins.common.tiny.checkpoint import make_tiny

PEER = {"agents": 40, "steps": 200, "prefix-tokens": 500, "answer-tokens": 8}
BASE = {"agents": 20, "steps": 100, "prefix-tokens": 500, "answer-tokens": 4}
# A run that is not measured: in the first requests, code is compiled and memory allocated for half a minute.
WARM_UP = {"agents": 8, "steps": 26, "prefix-tokens": 200, "answer-tokens": 4, "seed": 1000}
# What each run changes in BASE. The turns of an agent are set by the number of steps.
SWEEP: dict[str, list[dict[str, int]]] = {
    "turns": [{"steps": 20 * turns} for turns in (3, 5, 10, 20, 40)],
    "agents": [{"agents": agents, "steps": 5 * agents} for agents in (10, 20, 40, 80, 160)],
    "prefix": [{"prefix-tokens": tokens} for tokens in (500, 1000, 2000, 4000)],
}
# vLLM's CPU backend has a prefix cache only if MLA is disabled.
SERVER = {"VLLM_MLA_DISABLE": "1", "VLLM_CPU_KVCACHE_SPACE": "4", "HF_HUB_OFFLINE": "1"}
# With the plugin these parsers are the default. Without them vLLM alone refuses requests with tools.
PARSERS = ("--enable-auto-tool-choice", "--tool-call-parser", "kimi_k2", "--reasoning-parser", "kimi_k2")
FLAGS = (*PARSERS, "--enforce-eager", "--enable-prefix-caching", "--max-model-len", "32768", "--max-num-seqs", "300")


def say_letters(folder: Path) -> None:
    """Make a small checkpoint answer in ASCII only, so that its answers have the same length in every server's prompts.

    A random model also answers with reserved tokens, which the plugin shows by name and vLLM leaves out.
    """
    name = "language_model.lm_head.weight"
    file = folder / json.loads((folder / INDEX_FILE).read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name][:32] = 0
    tensors[name][127:] = 0
    save_file(tensors, file, metadata={"format": "pt"})


def with_bfloat16_experts(source: Path, folder: Path) -> None:
    """Write to `folder` a copy of a small checkpoint with bfloat16 experts of the same values."""
    checkpoint = Checkpoint(source)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", INDEX_FILE))
    tensors = {}
    for name in checkpoint.table:
        owner, _, part = name.rpartition(".")
        if part == "weight_packed":
            scale = checkpoint.tensor(f"{owner}.weight_scale")
            tensors[f"{owner}.weight"] = dequantize(checkpoint.tensor(name), scale)
        elif part not in ("weight_scale", "weight_shape"):
            tensors[name] = checkpoint.tensor(name).clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    for owner in (config, config["text_config"]):
        owner.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2))


@contextmanager
def vllm(python: str, folder: Path, **environment: str) -> Iterator[str]:
    """Start a server, yield its address, and stop the server when the block ends. Its log is beside the checkpoint."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [str(Path(python).with_name("vllm")), "serve", str(folder), "--port", str(port), *FLAGS]
    with folder.with_suffix(".log").open("w") as log:
        process = subprocess.Popen(
            command, env={**os.environ, **SERVER, **environment}, stdout=log, stderr=log, start_new_session=True
        )
    try:
        while True:
            if process.poll() is not None:
                raise SystemExit(folder.with_suffix(".log").read_text()[-3000:])
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(1)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def swarm(url: str, shape: dict[str, int], out: Path) -> dict[str, Any]:
    """Run `k26 swarm` against a server, and return its figures. Raises SystemExit if the server did not hold."""
    flags = [text for name, value in shape.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-c", "from k26_plugins.cli import app; app()", "swarm", "--url", url, *flags]
    done = subprocess.run([*command, "--replays", "0", "--json", str(out)], check=False)
    if done.returncode != 0:
        raise SystemExit(f"the swarm {shape} was not held: exit status {done.returncode}")
    figures: dict[str, Any] = json.loads(out.read_text())["figures"]
    return figures


def peer(python: str, folder: Path, turns: int) -> list[dict[str, Any]]:
    """Measure the server with the plugin and the bf16 baseline, and return a row for each server and turn."""
    make_tiny(folder / "int4")
    say_letters(folder / "int4")
    with_bfloat16_experts(folder / "int4", folder / "bf16")
    results = []
    # The servers take turns, so that other work on the machine slows both alike.
    for turn in range(turns):
        for name, checkpoint, plugins in (("plugin, INT4", "int4", "k26"), ("vLLM alone, bfloat16", "bf16", "none")):
            with vllm(python, folder / checkpoint, VLLM_PLUGINS=plugins) as url:
                swarm(url, WARM_UP, folder / "run.json")
                figures = swarm(url, PEER, folder / "run.json")
            results.append({"server": name, "turn": turn, **figures})
    return results


def sweep(python: str, folder: Path) -> list[dict[str, Any]]:
    """Measure every run of SWEEP on one server, and return a row for each run."""
    make_tiny(folder / "int4")
    results: list[dict[str, Any]] = []
    with vllm(python, folder / "int4") as url:
        swarm(url, WARM_UP, folder / "run.json")
        for name, shapes in SWEEP.items():
            for change in shapes:
                # Each run has its own seed, so that it finds no earlier run's prefix in the cache.
                shape = {**BASE, **change, "seed": len(results) + 1}
                results.append({"grows": name, "shape": shape, **swarm(url, shape, folder / "run.json")})
    for row in results:
        row["size"], row["pairs"] = size(row), pairs(row)
    return results


def size(row: dict[str, Any]) -> float:
    """Return the size that grows in a run: an agent's turns, the agents, or a mean prompt's tokens (mostly prefix)."""
    shape = row["shape"]
    if row["grows"] == "turns":
        return float(shape["steps"] / shape["agents"])
    return float(shape["agents"] if row["grows"] == "agents" else row["prompt_tokens"] / row["steps"])


def pairs(row: dict[str, Any]) -> float:
    """Return how many pairs of a computed token and a token of its context attention goes through in a run."""
    computed = row["prompt_tokens"] * (1 - row["prefix_hit_rate"]) + row["completion_tokens"]
    return float(computed * row["prompt_tokens"] / row["steps"])


def account(results: list[dict[str, Any]]) -> tuple[float, float]:
    """Fit the cost model: return the seconds for a request and for a pair that make the runs' relative errors least."""
    work = np.array([(row["steps"], row["pairs"]) for row in results])
    seconds = np.array([row["seconds"] for row in results])
    found = np.linalg.lstsq(work / seconds[:, None], np.ones(len(results)), rcond=None)[0]
    return float(found[0]), float(found[1])


def explained(row: dict[str, Any], costs: tuple[float, float]) -> float:
    """Return the seconds of a run by the cost model. costs: as `account` returns them."""
    return costs[0] * row["steps"] + costs[1] * float(row["pairs"])


def exponents(results: list[dict[str, Any]]) -> dict[str, float]:
    """Return for each growth the exponent of seconds over size: 1 is linear, 0 is constant.

    The exponents are least-squares fits of the logarithms.
    """
    found = {}
    for name in SWEEP:
        rows = [row for row in results if row["grows"] == name]
        sizes, seconds = ([math.log(row[key]) for row in rows] for key in ("size", "seconds"))
        found[name] = round(float(np.polyfit(sizes, seconds, 1)[0]), 2)
    return found


def plot(kind: str, results: list[dict[str, Any]], file: Path) -> None:
    """Draw the results of `peer` or `sweep` into `file`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.5), layout="constrained")
    if kind == "sweep":
        costs = account(results)
        labels = {"turns": "turns of each agent", "agents": "agents", "prefix": "tokens of a mean prompt"}
        for axes, (name, label) in zip(figure.subplots(1, 3, sharey=True), labels.items(), strict=True):
            rows = [row for row in results if row["grows"] == name]
            sizes = [row["size"] for row in rows]
            axes.loglog(sizes, [row["seconds"] for row in rows], "o", color="#3465a4", label="measured")
            axes.loglog(
                sizes, [explained(row, costs) for row in rows], "-", color="#999999", label="requests and attention"
            )
            axes.set(xlabel=label, title=f"seconds ~ size^{exponents(results)[name]}")
            axes.set_xticks(sizes, [f"{size:.0f}" for size in sizes])
            axes.set_xticks([], minor=True)
        figure.axes[0].set_ylabel("seconds")
        figure.axes[0].legend(fontsize=8)
    else:
        panels = {
            "requests/s": "requests_per_second",
            "time to first token p50, s": "ttft",
            "inter-token latency p50, s": "inter_token",
        }
        names = list(dict.fromkeys(row["server"] for row in results))
        for axes, (title, key) in zip(figure.subplots(1, 3), panels.items(), strict=True):
            for place, name in enumerate(names):
                values = [
                    row[key] if key == "requests_per_second" else row[key]["50"]
                    for row in results
                    if row["server"] == name
                ]
                axes.bar(place, sum(values) / len(values), color="#3465a4" if place == 0 else "#999999")
                axes.plot([place] * len(values), values, "k_")
            axes.set_xticks(range(len(names)), names, fontsize=8)
            axes.set_title(title)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["peer", "sweep"])
    parser.add_argument("--python", required=True, help="the Python of an environment with vLLM and this package")
    parser.add_argument("--turns", type=int, default=2, help="how often each server of `peer` is measured")
    parser.add_argument("--save", action="store_true", help="write JSON and a plot beside the other results")
    arguments = parser.parse_args()
    here = machine()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.kind == "peer":
            results = peer(arguments.python, Path(folder), arguments.turns)
        else:
            results = sweep(arguments.python, Path(folder))
    for row in results:
        name = row.get("server") or f"{row['grows']} {row['size']:.0f}"
        times = f"TTFT p50 {row['ttft']['50']:.2f} s, inter-token p50 {row['inter_token']['50']:.3f} s"
        print(f"{name:24} {row['seconds']:7.1f} s, {row['requests_per_second']:6.2f} requests/s, {times}")
    if arguments.kind == "sweep":
        costs = account(results)
        error = max(abs(explained(row, costs) / row["seconds"] - 1) for row in results)
        print("exponents:", exponents(results))
        print(
            f"{1e3 * costs[0]:.1f} ms a request and {1e9 * costs[1]:.1f} ns a pair explain each run within {error:.0%}"
        )
    if arguments.save:
        shape = PEER if arguments.kind == "peer" else BASE
        found: dict[str, Any] = {"machine": here, "server": [*FLAGS], "shape": shape, "results": results}
        if arguments.kind == "sweep":
            found |= {"exponents": exponents(results), "seconds_a_request": costs[0], "seconds_a_pair": costs[1]}
        plot(arguments.kind, results, keep(f"swarm-{arguments.kind}", found).with_suffix(".svg"))


if __name__ == "__main__":
    main()
