"""Write the engine's own commands for a plan, one for each machine. A command is a list of words."""

from __future__ import annotations

import shlex

from k26_plugins.operate.plan.fit import Fit
from k26_plugins.operate.plan.hybrid import Hybrid

ENGINES = ("vllm", "sglang", "ktransformers")
PARSERS = ["--tool-call-parser", "kimi_k2", "--reasoning-parser", "kimi_k2"]
HEAD = "HEAD_ADDRESS"
"""A placeholder for the first machine's address, which all other machines must reach; the user replaces it."""
VLLM_PORT, SGLANG_PORT, RAY_PORT = 29500, 20000, 6379


def vllm_command(checkpoint: str, fit: Fit) -> list[str]:
    """Return vLLM's command. checkpoint: a folder or a name on the hub."""
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
    # No parsers are named: the plugin chooses its own parsers, and a flag would replace them with vLLM's.
    return command


def sglang_command(checkpoint: str, fit: Fit) -> list[str]:
    """Return SGLang's command. checkpoint: a folder or a name on the hub."""
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
    # SGLang's fraction of the memory is for weights and KV cache together; activations and buffers take the rest.
    static = (fit.budget - fit.activations - fit.overhead) / fit.gpu.memory
    command += ["--context-length", str(_context(fit)), "--mem-fraction-static", f"{static:.2f}"]
    return [*command, "--chunked-prefill-size", str(fit.load.batched_tokens), *PARSERS]


def ktransformers_command(checkpoint: str, fit: Fit, plan: Hybrid, threads: int, sockets: int) -> list[str]:
    """Return the command of a hybrid run: SGLang's, with its `--kt-…` flags.

    checkpoint: a folder, since the experts on the GPUs and those in system memory are read from the same files.
    threads: CPU threads that compute experts. sockets: NUMA nodes over which these threads are spread.
    """
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
    """Return the command of each machine, by the machine's rank, if the engine is started on every machine by hand."""
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
    """Return three commands for a Ray cluster: Ray's head, then the server, then Ray on every other machine.

    The first two run on the first machine. The server must be started after Ray runs on all machines.
    """
    served = [*command, "--distributed-executor-backend", "ray"]
    if engine != "vllm":
        served = [*command, "--nnodes", str(nodes), "--use-ray"]
    return [
        ["ray", "start", "--head", "--port", str(RAY_PORT)],
        served,
        ["ray", "start", "--address", f"{HEAD}:{RAY_PORT}"],
    ]


def plain_command(engine: str, checkpoint: str, device: str | None) -> list[str]:
    """Return the command without any plan, for a machine without a GPU or for weights in another layout.

    device: SGLang's `--device`; None leaves the choice to SGLang. vLLM's command does not use it.
    """
    if engine == "vllm":
        return ["vllm", "serve", checkpoint]
    command = ["python", "-m", "sglang.launch_server", "--model-path", checkpoint]
    return command if device is None else [*command, "--device", device]


def shown(command: list[str]) -> str:
    """Return the command as one line for a shell."""
    return shlex.join(command)


def _context(fit: Fit) -> int:
    """Return the tokens of one request of the load, images included, but no more than the model can take."""
    return min(fit.load.tokens // fit.load.concurrency, fit.max_position)
