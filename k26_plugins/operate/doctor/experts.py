"""Examine which backends of experts run on this device, with the self-test that a server makes at its start."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from k26_plugins.common.checkpoint import Checkpoint, CheckpointError, Layout, classify_folder
from k26_plugins.common.experts import BACKENDS, ExpertsError, ExpertWeights, find_backend
from k26_plugins.common.experts.native.build import BuildError
from k26_plugins.common.experts.native.threads import process_threads
from k26_plugins.common.experts.selftest import self_test_error
from k26_plugins.common.host.cpu import cpu_flags
from k26_plugins.common.model.config import ConfigError, OtherLayoutError, TextConfig
from k26_plugins.common.reference.decoder import MoE
from k26_plugins.common.settings import ENGINE, EXPERTS, backend_names
from k26_plugins.operate.doctor.finding import Finding, Level
from k26_plugins.operate.doctor.tuned import tuned_findings
from k26_plugins.operate.random_experts import random_experts

NUM_EXPERTS = 2
# The instruction sets that decide how fast integers are multiplied: the name in /proc/cpuinfo, and the name to show.
CPU_FEATURES = {
    "avx2": "AVX2",
    "avx_vnni": "AVX-VNNI",
    "avx512f": "AVX512",
    "avx512_vnni": "AVX512-VNNI",
    "amx_bf16": "AMX",
    "asimddp": "ARM's dot product",
    "i8mm": "i8mm",
    "sve": "SVE",
}


def experts_findings(checkpoint: Path | None) -> list[Finding]:
    """Return the self-test's result for every backend on this device, and which experts a server would take.

    The weights are two experts of the checkpoint's first MoE layer, or random ones of the published sizes if there is
    no checkpoint or if it has another layout.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        setting = EXPERTS.read()
    except ValueError as error:
        return [Finding(Level.BAD, "experts", str(error), *[f"unset {EXPERTS.variable}"] * 2)]
    try:
        weights, source = _weights(checkpoint)
    except OtherLayoutError:
        weights, source = _weights(None)
    except (CheckpointError, ConfigError) as error:
        return [Finding(Level.BAD, "experts", f"no weights to test with: {error}", "give a whole checkpoint")]
    on_device = ExpertWeights(*(getattr(weights, name).to(device) for name in weights.__slots__))
    findings, chosen = [instruction_set()], None
    for name in backend_names():
        title = f"experts: {name}"
        try:
            backend = find_backend(name)
            reason = backend.unsupported(on_device)
        except ExpertsError as error:
            reason = str(error)
        if reason is not None:
            findings.append(Finding(Level.NOTE, title, f"cannot run here: {reason}"))
            continue
        begin = time.perf_counter()
        difference = self_test_error(backend, on_device)
        seconds = time.perf_counter() - begin
        passed = difference <= backend.tolerance
        if passed and name in BACKENDS:
            chosen = chosen or name
        detail = f"relative error {difference:.1e} (limit {backend.tolerance:g}) on {device}, {source}, {seconds:.2f} s"
        remedy = "" if passed else "report it with the device's name; the next backend is used"
        findings.append(Finding(Level.OK if passed else Level.BAD, title, detail, remedy))
    if setting == "auto" and device != "cpu":
        # On a GPU a server chooses by what `k26 tune` measured for its layers' sizes, and not the first backend that is
        # right.
        return [*findings, *tuned_findings(on_device.device)]
    taken = "the engine's own" if setting == ENGINE else chosen if setting == "auto" else setting
    if taken is None:
        return [*findings, Finding(Level.BAD, "experts", "no backend can be used", "do not serve on this machine")]
    return [*findings, Finding(Level.OK, "experts", f"a server on {device} takes: {taken}")]


def instruction_set() -> Finding:
    """Return which instruction sets for integer products the CPU has, and which one the native experts use."""
    flags = cpu_flags()
    has = ", ".join(shown for name, shown in CPU_FEATURES.items() if name in flags) or "none that is known"
    try:
        taken = process_threads().instruction_set
    except BuildError:
        taken = "none"
    return Finding(Level.NOTE, "experts: instruction sets", f"this CPU has {has}; native takes {taken}")


def _weights(checkpoint: Path | None) -> tuple[ExpertWeights, str]:
    if checkpoint is not None:
        if classify_folder(checkpoint).layout is not Layout.PUBLISHED:
            raise OtherLayoutError("not the core's to open")
        opened = Checkpoint(checkpoint)
        text = opened.config.text
        moe = MoE(text, opened.tensor, text.first_k_dense_replace)
        experts = [moe.expert(index) for index in range(NUM_EXPERTS)]
        return ExpertWeights(*(torch.stack(parts) for parts in zip(*experts, strict=True))), "the checkpoint's weights"
    text = TextConfig()
    weights = random_experts(NUM_EXPERTS, text.hidden_size, text.moe_intermediate_size, "cpu")
    return weights, "random weights of the published sizes"
