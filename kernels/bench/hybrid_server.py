"""Compare a hybrid run's speed as `k26 plan --measure` predicts it with the time that a real server takes on this CPU.

    python kernels/bench/hybrid_server.py [--save]        in SGLang's environment, about four minutes, 5 GB of memory

The checkpoint has experts of the published size and few layers. One core of this machine takes the GPU's place: the
rate at which it multiplies in a GEMM and the rate at which it reads in a GEMV are the GPU's GEMM rate and bandwidth in
the cost model. Another core computes the CPU's experts. The predicted times of the two sides are added, though a GPU
would work at the same time as the CPU: here one library computes the experts of both sides, one call at a time.

The cost model leaves out what a server does once in a step, whatever its number of layers; in 61 layers this would be a
small part. The time of a single layer is therefore compared too: the difference of two servers, divided by the
difference of their numbers of layers.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
import torch
from bench.kept import keep, machine
from support.quick import make_quick
from support.server import Server
from support.sglang_server import EAGER, serve

from k26_plugins.common.model.config import K26Config, TextConfig
from k26_plugins.common.tiny.checkpoint import TinySizes
from k26_plugins.operate.hybrid_rates import measure
from k26_plugins.operate.plan.fit import Load, fit
from k26_plugins.operate.plan.gpus import Gpu
from k26_plugins.operate.plan.hybrid import Hybrid
from k26_plugins.operate.plan.hybrid_speed import GPU_SHARE, Rates, decode_step, prefill_step
from k26_plugins.operate.plan.weights import Layout

LAYERS, EXPERTS, ON_GPU = (2, 6), 16, 4
PROMPTS, ANSWER = (128, 512), 24
TURNS = 4
GEMM_SIZE = 2048
ONE_CORE = {"OMP_NUM_THREADS": "1"}


def make(folder: Path, layers: int) -> K26Config:
    """Make a checkpoint with experts of the published size and everything else tiny, and return its configuration.

    layers: number of MoE layers, which follow one dense layer.
    """
    text = TextConfig()
    sizes = TinySizes(
        hidden_size=text.hidden_size, moe_intermediate_size=text.moe_intermediate_size, layers=1 + layers,
        experts=EXPERTS, top_k=text.num_experts_per_tok,
    )  # fmt: skip
    make_quick(folder, sizes)
    return K26Config.from_path(folder)


def gemm_rate() -> float:
    """Return the operations a second of a large bfloat16 GEMM on the CPU."""
    matrix = torch.randn(GEMM_SIZE, GEMM_SIZE).to(torch.bfloat16)
    return 2 * GEMM_SIZE**3 / min(seconds(lambda: matrix @ matrix) for _ in range(5))


def gemv_rate(text: TextConfig) -> float:
    """Return the bytes a second at which a GEMV reads a bfloat16 matrix."""
    matrix = torch.randn(2 * text.moe_intermediate_size, text.hidden_size).to(torch.bfloat16)
    row = torch.randn(1, text.hidden_size).to(torch.bfloat16)
    return matrix.nbytes / min(seconds(lambda: torch.nn.functional.linear(row, matrix)) for _ in range(9))


def rates_of(config: K26Config) -> tuple[Rates, Gpu]:
    """Measure and return the rates of the CPU's core, and as a GPU the core that takes the GPU's place."""
    usable = sorted(os.sched_getaffinity(0))
    torch.set_num_threads(1)
    try:
        os.sched_setaffinity(0, {usable[0]})
        rates = measure(config.text)
        os.sched_setaffinity(0, {usable[-1]})
        gpu = Gpu("a core", 2**40, gemv_rate(config.text), "")
        # The planner counts on a share of a GPU's GEMM rate; the division makes this share what was measured.
        return replace(rates, gpu_gemm=gemm_rate() / GPU_SHARE), gpu
    finally:
        os.sched_setaffinity(0, usable)


def seconds(run: Callable[[], object]) -> float:
    """Return the seconds that a function takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def predicted(config: K26Config, gpu: Gpu, rates: Rates) -> dict[str, float]:
    """Return the milliseconds of each prompt, and of a token of an answer, by the planner's cost model."""
    found = fit(config, gpu, Layout(absorbed_copy=True), Load(context=2048))
    plan = Hybrid(ON_GPU, EXPERTS, 0, None, 0)
    steps = {f"prompt of {count}": prefill_step(config, found, plan, rates, chunk=count, before=0) for count in PROMPTS}
    steps["token"] = decode_step(config, found, plan, rates, sequences=1, context=PROMPTS[0], in_graph=False)
    return {name: 1e3 * (step.cpu + max(step.gpu, step.launches) + step.waits) for name, step in steps.items()}


def measured(server: Server) -> dict[str, float]:
    """Return the times of `predicted` as a real server takes them: the median of several turns, in milliseconds."""
    times: dict[str, list[float]] = {}
    for turn in range(TURNS + 1):
        found = {}
        for count in PROMPTS:
            found[f"prompt of {count}"] = asked(server, count, 1, seed=turn)
        longer = asked(server, PROMPTS[0], 1 + ANSWER, seed=turn)
        found["token"] = (longer - found[f"prompt of {PROMPTS[0]}"]) / ANSWER
        for name, value in found.items() if turn else ():
            times.setdefault(name, []).append(1e3 * value)
    return {name: median(values) for name, values in times.items()}


def asked(server: Server, prompt: int, answer: int, *, seed: int) -> float:
    """Return the seconds that a request takes. prompt, answer: lengths in tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 256, (prompt,), generator=generator).tolist()
    sampling = {"max_new_tokens": answer, "temperature": 0, "ignore_eos": True}
    start = time.perf_counter()
    response = server.post("/generate", input_ids=ids, sampling_params=sampling)
    response.raise_for_status()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write the results beside this file, named by date and CPU")
    arguments = parser.parse_args()
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"  # read when SGLang is imported
    here = machine()
    model: list[dict[str, float]] = []
    real: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for layers in LAYERS:
            folder = Path(scratch) / str(layers)
            config = make(folder, layers)
            rates, gpu = rates_of(config)
            model.append(predicted(config, gpu, rates))
            flags = ["--kt-weight-path", str(folder), "--kt-num-gpu-experts", str(ON_GPU)]
            flags += ["--kt-cpuinfer", "1", "--disable-cuda-graph", "--disable-radix-cache"]
            flags += ["--chunked-prefill-size", str(max(PROMPTS))]
            with serve(folder, Path(scratch) / "log", *flags, **ONE_CORE, **EAGER) as server:
                real.append(measured(server))
    rows = {}
    for name in model[0]:
        for what, of in ((f"{LAYERS[1]} layers", lambda found: found[1]), ("a layer", per_layer)):
            one, other = of([each[name] for each in model]), of([each[name] for each in real])
            rows[f"{name}, {what}"] = {"predicted_ms": round(one, 2), "measured_ms": round(other, 2)}
            print(f"{name + ', ' + what:28} predicted {one:8.2f} ms, measured {other:8.2f} ms, ratio {one / other:.2f}")
    if arguments.save:
        keep("hybrid-server", {"machine": here, "sglang": version("sglang"), "results": rows})


def per_layer(found: list[float]) -> float:
    """Return the time of one layer, from the times of the two servers of LAYERS."""
    return (found[1] - found[0]) / (LAYERS[1] - LAYERS[0])


if __name__ == "__main__":
    main()
