"""Predict the speed of a hybrid run in prefill and decode, and find the chunk size of prefill that is the fastest.

In a step, each layer first computes what precedes the routing, then the CPU's experts while the GPUs compute theirs,
then the sum. The number of bytes is the planner's, and each byte is read once. The rates of the CPU's experts, of the
links and of a large GEMM on a GPU are measured (`k26 plan --measure`). Nobody measured the rest of what a GPU does; the
constants below are assumptions.
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
"""The share of the memory's read rate that the experts on a CPU reach with one token; measured as 80 to 99 %
(docs/cpu-experts.md)."""
# The constants from here to GPU_SHARE are assumed: none was measured on a GPU.
# Kernels of a layer: attention, norms and router; the GPUs' routed and shared experts; the sums and what follows them.
BEFORE, BESIDE, AFTER = 12, 7, 3
# Seconds: to launch a kernel from Python; to launch a kernel in a CUDA graph; for a small copy; until the stream has
# called the host; until the host is awake after the stream; for an all-reduce over the GPUs, of which a layer has two.
LAUNCH, LAUNCH_IN_GRAPH, COPY, CALL, WAKE, SUM = 10e-6, 2e-6, 5e-6, 10e-6, 20e-6, 12e-6
COPIES = 4  # Activations, ids and weights go to the host, and the result comes back.
# The share of a large GEMM's rate that the kernels of prefill reach on average.
GPU_SHARE = 0.6
CHUNKS = (2048, 4096, 8192, 16384, 32768)
"""Numbers of prompt tokens in one step (`--chunked-prefill-size`) that are tried."""
ANSWER = 1024
"""Number of a request's tokens that are taken for its answer; half of the tokens if the request has fewer than
2,048."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """The measured rates of a machine."""

    host: Line
    """Seconds of one whole expert on all of the CPU's cores, over its number of tokens."""
    link: float | None = None
    """Bytes per second from host memory to all GPUs together; None if no experts are streamed."""
    gpu_gemm: float | None = None
    """Operations per second of a large bfloat16 GEMM on one GPU; if None, arithmetic on the GPUs takes no time in
    prefill."""

    @classmethod
    def of_bandwidth(cls, config: K26Config, bandwidth: float) -> Rates:
        """Return the rates that follow from the bandwidth of system memory alone, in bytes per second.

        They hold for one token or a few tokens but not for prefill, because they count no time for an expert's
        arithmetic.
        """
        return cls(host=Line(expert_bytes(config.text) / (bandwidth * NATIVE_SHARE), 0.0))


@dataclass(frozen=True, slots=True)
class Step:
    """The seconds of one step, summed over all layers.

    Each part is counted whole even if it runs while another does, so the parts may add up to more than `total`.
    """

    cpu: float
    """The experts on the CPU."""
    gpu: float
    """The kernels on the GPUs."""
    waits: float
    """Copies between GPU and host in decode, and waits of one for the other."""
    launches: float
    """Kernel launches."""
    total: float
    """The whole step."""


@dataclass(frozen=True, slots=True)
class Speed:
    """The predicted speed of one request of the load's length, whose last tokens are its answer."""

    chunk: int
    """Prompt tokens in one step."""
    prompt_tokens: int
    prompt_seconds: float
    """Seconds to the first token."""
    answer_tokens: int
    waiting: Step
    """The step of one answer token without CUDA graphs."""
    graph: Step
    """The step of one answer token in a CUDA graph."""

    @property
    def seconds(self) -> float:
        """Seconds of the whole request without CUDA graphs."""
        return self.prompt_seconds + self.answer_tokens * self.waiting.total


def decode_step(
    config: K26Config, fit: Fit, plan: Hybrid, rates: Rates, *, sequences: int, context: int, in_graph: bool
) -> Step:
    """Return the step that decodes one token of each of `sequences` requests that are `context` tokens long.

    fit: its GPU must have a bandwidth. in_graph: whether the step is a CUDA graph.
    """
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
    """Return the step that computes `chunk` tokens of a prompt after `before` of its tokens, without a CUDA graph.

    The router is assumed to choose experts evenly. fit: its GPU must have a bandwidth.
    """
    text, bandwidth, tp = config.text, fit.gpu.bandwidth, fit.layout.tp
    assert bandwidth is not None, "without a bandwidth nothing is predicted"
    layers = text.num_hidden_layers - text.first_k_dense_replace
    rate = None if rates.gpu_gemm is None else rates.gpu_gemm * GPU_SHARE * tp

    def on_gpu(operations: float, num_bytes: float) -> float:
        """Return the seconds of `operations` on all GPUs together, while each of them reads `num_bytes`."""
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
    # Each token takes two operations for each weight of two bytes, so as many operations as there are bytes of weights.
    # It attends to all tokens before the chunk and, on average, to half of the chunk.
    attended = 2.0 * chunk * (before + chunk / 2) * text.num_attention_heads * (text.qk_head_dim + text.v_head_dim)
    read = _before_bytes(config, fit)
    dense = chunk * read * tp / layers
    attention = on_gpu(dense + attended, (read + (before + chunk) * fit.kv_per_token) / layers)
    launches = (BEFORE + BESIDE + AFTER) * LAUNCH
    layer = max(attention, BEFORE * LAUNCH) + max(cpu, beside, BESIDE * LAUNCH) + AFTER * LAUNCH + WAKE
    return Step(*(time * layers for time in (cpu, attention + beside, WAKE, launches, layer)))


def speed(config: K26Config, fit: Fit, plan: Hybrid, rates: Rates) -> Speed:
    """Return the predicted speed of one request of the load, with prefill in chunks of the load's `batched_tokens`."""
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
    """Return the fit, the division of the experts and the speed for the chunk size with which a request ends first.

    Returns None if no chunk size fits. With a larger chunk the experts are copied and read less often, but its
    activations leave room for fewer experts on the GPUs. found: the plan with all experts on the GPUs. ram: bytes of
    system memory.
    """
    best = None
    for chunk in CHUNKS:
        # A chunk is no larger than the request, as in SGLang; the smallest chunk is always tried.
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
    """Return the number of cores for the CPU's experts (`--kt-cpuinfer`).

    With at least 8 cores for each rank, one core is left for each rank's own process, which keeps a core busy while it
    waits for its GPU. If it took that core from the experts, the slowest of their threads would hold up the layer. With
    fewer cores, the experts get all of them.
    """
    return cores - ranks if cores >= 8 * ranks else cores


def _before_bytes(config: K26Config, fit: Fit) -> float:
    """Return the bytes of weights that each GPU reads in a step, without experts; all count as before the routing."""
    return plain_bytes(config, fit) - fit.weights["shared experts"]
