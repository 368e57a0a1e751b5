"""The engine's own commands for a plan, one for each machine."""

from __future__ import annotations

import shlex

from k26_plugins.operate.plan.fit import Fit
from k26_plugins.operate.plan.hybrid import Hybrid

ENGINES = ("vllm", "sglang", "ktransformers")
PARSERS = ["--tool-call-parser", "kimi_k2", "--reasoning-parser", "kimi_k2"]
HEAD = "HEAD_ADDRESS"
"""To be filled in: the first machine's address, which the others reach."""
VLLM_PORT, SGLANG_PORT, RAY_PORT = 29500, 20000, 6379


def vllm_command(checkpoint: str, fit: Fit) -> list[str]:
    layout = fit.layout
    command = ["vllm", "serve", checkpoint, "--tensor-parallel-size", str(layout.tp)]
    if layout.pp > 1:
        command += ["--pipeline-parallel-size", str(layout.pp)]
    if layout.expert_parallel:
        command += ["--enable-expert-parallel"]
    if layout.context_parallel > 1:
        command += ["--decode-context-parallel-size", str(layout.context_parallel)]
    if layout.vision_whole:
        command += ["--mm-encoder-tp-mode", "data"]
    if fit.load.kv_dtype == "fp8":
        command += ["--kv-cache-dtype", "fp8"]
    command += ["--max-model-len", str(_context(fit)), "--gpu-memory-utilization", f"{fit.load.memory_fraction:.2f}"]
    command += ["--max-num-batched-tokens", str(fit.load.batched_tokens), "--max-num-seqs", str(fit.load.sequences)]
    # Without parsers: the plugin chooses its own, and a flag would put vLLM's in their place.
    return command


def sglang_command(checkpoint: str, fit: Fit) -> list[str]:
    layout = fit.layout
    command = ["python", "-m", "sglang.launch_server", "--model-path", checkpoint, "--tp-size", str(layout.tp)]
    if layout.pp > 1:
        command += ["--pp-size", str(layout.pp)]
    if layout.expert_parallel:
        command += ["--ep-size", str(layout.tp)]
    if layout.vision_whole:
        command += ["--mm-enable-dp-encoder"]
    if fit.load.kv_dtype == "fp8":
        command += ["--kv-cache-dtype", "fp8_e4m3"]
    # SGLang's fraction is for weights and KV cache together; what is left of the memory is for all else.
    static = (fit.budget - fit.activations - fit.overhead) / fit.gpu.memory
    command += ["--context-length", str(_context(fit)), "--mem-fraction-static", f"{static:.2f}"]
    return [*command, "--chunked-prefill-size", str(fit.load.batched_tokens), *PARSERS]


def ktransformers_command(checkpoint: str, fit: Fit, plan: Hybrid, threads: int, sockets: int) -> list[str]:
    """SGLang with its `--kt-…` flags. `checkpoint` is a folder: the experts of both sides are read from the same files."""
    command = ["python", "-m", "sglang.launch_server", "--model", checkpoint, "--kt-weight-path", checkpoint]
    command += ["--kt-method", "RAWINT4", "--kt-num-gpu-experts", str(plan.gpu_experts), "--kt-cpuinfer", str(threads)]
    command += ["--kt-threadpool-count", str(sockets), "--tensor-parallel-size", str(fit.layout.tp)]
    command += [
        "--disable-cuda-graph",
        "--disable-shared-experts-fusion",
        "--mem-fraction-static",
        f"{fit.load.memory_fraction:.2f}",
    ]
    command += ["--context-length", str(_context(fit)), "--max-total-tokens", str(fit.load.tokens)]
    return [*command, "--chunked-prefill-size", str(fit.load.batched_tokens), *PARSERS]


def of_each_node(engine: str, command: list[str], nodes: int) -> list[list[str]]:
    """The command of each machine, by its rank, where the engine starts its own processes everywhere."""
    if nodes == 1:
        return [command]
    if engine == "vllm":
        together = ["--nnodes", str(nodes), "--master-addr", HEAD, "--master-port", str(VLLM_PORT)]
        return [
            [*command, *together, "--node-rank", str(rank), *(["--headless"] if rank else [])] for rank in range(nodes)
        ]
    together = ["--nnodes", str(nodes), "--dist-init-addr", f"{HEAD}:{SGLANG_PORT}"]
    return [[*command, *together, "--node-rank", str(rank)] for rank in range(nodes)]


def with_ray(engine: str, command: list[str], nodes: int) -> list[list[str]]:
    """The commands over a Ray cluster: the first machine's two, then that of every other machine."""
    served = [*command, "--distributed-executor-backend", "ray"]
    if engine != "vllm":
        served = [*command, "--nnodes", str(nodes), "--use-ray"]
    return [
        ["ray", "start", "--head", "--port", str(RAY_PORT)],
        served,
        ["ray", "start", "--address", f"{HEAD}:{RAY_PORT}"],
    ]


def plain_command(engine: str, checkpoint: str, device: str | None) -> list[str]:
    """The command where there is nothing to plan: without a GPU, or of another layout of the weights."""
    if engine == "vllm":
        return ["vllm", "serve", checkpoint]
    command = ["python", "-m", "sglang.launch_server", "--model-path", checkpoint]
    return command if device is None else [*command, "--device", device]


def shown(command: list[str]) -> str:
    return shlex.join(command)


def _context(fit: Fit) -> int:
    """Tokens of one request of the load, images included."""
    return min(fit.load.tokens // fit.load.concurrency, fit.max_position)
