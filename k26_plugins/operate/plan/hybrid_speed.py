"""Predicted speed of a hybrid run: tokens a second of prompts and of answers, and the chunk of a prompt that is best.

A layer of a step is what comes before its routing is known, then the CPU's experts beside the GPUs', then their sum. Bytes
are the planner's, each read once. What the CPU's experts and the links take is measured (`k26 plan --measure`); what else a
GPU does nobody measured, and the assumptions stand below.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from k26_plugins.common.checkpoint import expert_bytes
from k26_plugins.common.expert_costs import Line, StreamCosts
from k26_plugins.common.model.config import K26Config
from k26_plugins.operate.plan.fit import Fit, fit
from k26_plugins.operate.plan.hybrid import Hybrid, hybrid
from k26_plugins.operate.plan.speed import experts_touched, plain_bytes

NATIVE_SHARE = 0.85
"""The share of its reading rate that a CPU's experts reach with one token: measured, 80 to 99 % (docs/cpu-experts.md)."""
# Assumed, as nothing below was measured on a GPU.
# Kernels of a layer: attention, norms and router; the GPUs' routed and shared experts; sums and what follows them.
BEFORE, BESIDE, AFTER = 12, 7, 3
# Seconds: to launch a kernel from Python, or in a graph; of a small copy; until the stream has called the host; until the
# host is awake after the stream; of a sum over GPUs, two in a layer.
LAUNCH, LAUNCH_IN_GRAPH, COPY, CALL, WAKE, SUM = 10e-6, 2e-6, 5e-6, 10e-6, 20e-6, 12e-6
COPIES = 4  # activations, ids and weights there, and the result back
# The share of a large GEMM's rate that a prompt's kernels reach together.
GPU_SHARE = 0.6
CHUNKS = (2048, 4096, 8192, 16384, 32768)
"""Tokens of a prompt in one step (`--chunked-prefill-size`) that are looked at."""
ANSWER = 1024
"""Tokens of a request that are taken for its answer, or half of a shorter request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What a machine does in a second."""

    host: Line
    """Seconds of one whole expert on the CPU's cores."""
    link: float | None = None
    """Bytes a second from the host's memory to all GPUs together; None: no expert is streamed."""
    gpu_gemm: float | None = None
    """Operations a second of a large bfloat16 GEMM on one GPU; None: a prompt's arithmetic there is not counted."""

    @classmethod
    def of_bandwidth(cls, config: K26Config, bandwidth: float) -> Rates:
        """Rates from the memory's bandwidth alone, bytes a second: they hold for a token or a few, not for prompts."""
        return cls(host=Line(expert_bytes(config.text) / (bandwidth * NATIVE_SHARE), 0.0))


@dataclass(frozen=True, slots=True)
class Step:
    """Seconds of a step; the parts are those of all layers, whatever runs beside them."""

    cpu: float
    gpu: float
    waits: float
    launches: float
    total: float


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast one request is that is as long as the load's, the last of its tokens the answer."""

    chunk: int
    prompt_tokens: int
    prompt_seconds: float
    answer_tokens: int
    waiting: Step
    """A token of the answer without CUDA graphs."""
    graph: Step

    @property
    def seconds(self) -> float:
        return self.prompt_seconds + self.answer_tokens * self.waiting.total


def decode_step(
    config: K26Config, fit: Fit, plan: Hybrid, rates: Rates, *, sequences: int, context: int, in_graph: bool
) -> Step:
    """A token of each of `sequences` requests that are `context` tokens long."""
    text, bandwidth = config.text, fit.gpu.bandwidth
    assert bandwidth is not None, "without a bandwidth nothing is predicted"
    layers = text.num_hidden_layers - text.first_k_dense_replace
    touched = experts_touched(config, sequences) / text.n_routed_experts
    on_host = plan.num_experts - plan.gpu_experts
    tokens = sequences * text.num_experts_per_tok * on_host / plan.num_experts
    cpu = on_host * touched * rates.host.expert + tokens * rates.host.token
    gpu_experts = expert_bytes(text) * plan.gpu_experts * touched / fit.layout.tp
    beside = gpu_experts / bandwidth + fit.weights["shared experts"] / bandwidth / layers
    read = _before_bytes(config, fit) + sequences * context * fit.kv_per_token
    before = read / bandwidth / layers + (2 * SUM if fit.layout.tp > 1 else 0.0)
    launch = LAUNCH_IN_GRAPH if in_graph else LAUNCH
    waits = COPIES * COPY + (2 * CALL if in_graph else WAKE)

    def part(seconds: float, kernels: int) -> float:
        return max(seconds + kernels * LAUNCH_IN_GRAPH, kernels * launch)

    layer = part(before, BEFORE) + max(cpu, part(beside, BESIDE)) + part(0, AFTER) + waits
    times = (cpu, before + beside, waits, (BEFORE + BESIDE + AFTER) * launch, layer)
    return Step(*(time * layers for time in times))


def prefill_step(config: K26Config, fit: Fit, plan: Hybrid, rates: Rates, *, chunk: int, before: int) -> Step:
    """`chunk` tokens of a prompt after `before` of its tokens. The router is taken to choose evenly."""
    text, bandwidth, tp = config.text, fit.gpu.bandwidth, fit.layout.tp
    assert bandwidth is not None, "without a bandwidth nothing is predicted"
    layers = text.num_hidden_layers - text.first_k_dense_replace
    rate = None if rates.gpu_gemm is None else rates.gpu_gemm * GPU_SHARE * tp

    def on_gpu(operations: float, num_bytes: float) -> float:
        """num_bytes: read by each GPU."""
        return max(num_bytes / bandwidth, 0.0 if rate is None else operations / rate)

    touched = experts_touched(config, chunk) / plan.num_experts
    each = chunk * text.num_experts_per_tok / plan.num_experts
    pair = 6.0 * text.hidden_size * text.moe_intermediate_size
    counts = [round(each / touched)] * round((plan.num_experts - plan.gpu_experts) * touched)
    if rates.link is None:
        cpu = sum(map(rates.host.seconds, counts))
    else:
        streamed = Line(expert_bytes(text) / rates.link, 0.0 if rate is None else pair / rate)
        cpu = StreamCosts(rates.host, streamed).predict(counts)
    beside = on_gpu(
        (plan.gpu_experts * each + text.n_shared_experts * chunk) * pair,
        plan.gpu_experts * touched * expert_bytes(text) / tp + fit.weights["shared experts"] / layers,
    )
    # Each token is multiplied by two bytes' weights once, and attends to those before it and half of its chunk.
    attended = 2.0 * chunk * (before + chunk / 2) * text.num_attention_heads * (text.qk_head_dim + text.v_head_dim)
    read = _before_bytes(config, fit)
    dense = chunk * read * tp / layers
    attention = on_gpu(dense + attended, (read + (before + chunk) * fit.kv_per_token) / layers)
    launches = (BEFORE + BESIDE + AFTER) * LAUNCH
    layer = max(attention, BEFORE * LAUNCH) + max(cpu, beside, BESIDE * LAUNCH) + AFTER * LAUNCH + WAKE
    return Step(*(time * layers for time in (cpu, attention + beside, WAKE, launches, layer)))


def speed(config: K26Config, fit: Fit, plan: Hybrid, rates: Rates) -> Speed:
    """How fast one request of the load is, in chunks of the load's `batched_tokens`."""
    context, chunk = fit.load.context, fit.load.batched_tokens
    answer = min(ANSWER, context // 2)
    prompt = context - answer
    seconds = 0.0
    for before in range(0, prompt, chunk):
        seconds += prefill_step(config, fit, plan, rates, chunk=min(chunk, prompt - before), before=before).total
    waiting, graph = (
        decode_step(config, fit, plan, rates, sequences=1, context=context, in_graph=flag) for flag in (False, True)
    )
    return Speed(chunk, prompt, seconds, answer, waiting, graph)


def fastest(config: K26Config, found: Fit, ram: int | None, rates: Rates) -> tuple[Fit, Hybrid, Speed] | None:
    """The chunk with which a request of the load is answered first, and what fits with it; None where no chunk fits.

    A larger chunk copies and reads the experts less often, and its activations leave the GPUs fewer experts.
    """
    best = None
    for chunk in CHUNKS:
        # No larger than the prompt, as SGLang has it.
        if chunk > max(found.load.context, CHUNKS[0]):
            break
        load = replace(found.load, batched_tokens=chunk)
        other = fit(config, found.gpu, found.layout, load)
        plan = hybrid(config, other, ram)
        if not plan.fits:
            continue
        its = speed(config, other, plan, rates)
        if best is None or its.seconds < best[2].seconds:
            best = (other, plan, its)
    return best


def threads_of(cores: int, ranks: int) -> int:
    """Cores for the CPU's experts (`--kt-cpuinfer`): all but one for each rank's own process, where there are many.

    While the CPU computes, the rank's process waits for its GPU and keeps a core busy; a layer is done when the slowest
    of the experts' threads is.
    """
    return cores - ranks if cores >= 8 * ranks else cores


def _before_bytes(config: K26Config, fit: Fit) -> float:
    """Weights that each GPU reads before the routings of all layers."""
    return plain_bytes(config, fit) - fit.weights["shared experts"]
