"""Tell which INT4 experts a planned server takes on its GPUs, from what `k26 tune` measured on such a GPU."""

from __future__ import annotations

import shlex

from k26_plugins.common.host.cache_folder import outcome_folder
from k26_plugins.common.model.config import TextConfig
from k26_plugins.operate.plan.fit import Fit
from k26_plugins.operate.plan.hardware import named


def experts_line(engine: str, text: TextConfig, fit: Fit) -> str:
    """Return the line of the plan that says which INT4 experts a server takes. engine: `vllm` or `sglang`."""
    tp, ep = (1, fit.layout.tp) if fit.layout.expert_parallel else (fit.layout.tp, 1)
    command = ["k26", "tune", *(["--ep", str(ep)] if ep > 1 else ["--tp", str(tp)]), "--engine", engine]
    shape = f"{text.hidden_size}x{text.moe_intermediate_size // tp}x{text.n_routed_experts // ep}"
    measured = _measured(engine, fit.gpu.name, shape)
    if measured is None:
        return f"INT4 experts: {engine}'s own, until `{shlex.join(command)}` on such a GPU finds the core's faster"
    return f"INT4 experts: {measured}"


def _measured(engine: str, gpu: str, shape: str) -> str | None:
    """Return what the newest outcome for this engine, GPU and shape chooses, or None if there is no such outcome.

    A server follows the outcome only if its driver and versions are those of the measurement.
    """
    files = sorted(outcome_folder().glob("*.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    if not files:
        return None
    # Reading an outcome needs torch, which takes time to import. It is not imported if there is no outcome.
    from k26_plugins.common.experts.outcome import OURS, OutcomeError, read_outcome
    from k26_plugins.common.experts.rule import choose

    for file in files:
        try:
            outcome = read_outcome(file)
        except OutcomeError:
            continue  # `k26 doctor` reports outcomes that cannot be read.
        here = named(outcome.key.gpu)
        if here is None or (here.name, outcome.key.shape) != (gpu, shape) or not outcome.key.engine.startswith(engine):
            continue
        choice = choose(outcome.timings, outcome.purpose)
        whose = "the core's" if choice.kernel == OURS else f"{outcome.key.engine}'s own"
        return f"{whose}, {choice.why} ({file})"
    return None
