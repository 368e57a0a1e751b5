"""Examine each installed engine: whether its version is one of those checked, and whether the plugin is active in it.

Each engine is examined by `python -m k26_plugins.ENGINE.probe`, a process of its own that loads plugins as the engine
does, so the findings say what a server would find.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

from k26_plugins.operate.doctor.finding import Finding, Level
from k26_plugins.operate.doctor.machine import installed, numbers

PROBES = {"vllm": "k26_plugins.vllm.probe", "sglang": "k26_plugins.sglang.probe"}
PLUGIN_LISTS = {"vllm": "VLLM_PLUGINS", "sglang": "SGLANG_PLUGINS"}
ENGINES = (*PROBES, "ktransformers")
# KTransformers' fork of SGLang, the only SGLang that KTransformers' command line starts.
FORK = "sglang-kt"
# The limit ends a probe that hangs. It is long because SGLang imports all of its models, which takes minutes on busy
# cores.
PROBE_SECONDS = 900


def is_installed(engine: str) -> bool:
    """Return whether the engine's Python package can be imported, without importing it."""
    spec = find_spec(engine)
    # A mere folder of that name on the path is found as a namespace package, which has no origin.
    return spec is not None and spec.origin is not None


def engine_findings(required: str | None) -> list[Finding]:
    """Return the findings about every installed engine. required: one of ENGINES, whose absence is a fault."""
    findings: list[Finding] = []
    for engine, probe in PROBES.items():
        if is_installed(engine):
            findings += _probe(engine, probe)
    kernel = installed("kt-kernel")
    if kernel is not None:
        detail = f"kt-kernel {kernel}: its CPU experts are tested as `experts: kt`"
        fork = installed(FORK)
        if fork is not None:
            is_active = any(finding.what == "sglang" and finding.level is Level.OK for finding in findings)
            detail += f"; `kt run` starts {FORK} {fork} {'with' if is_active else 'WITHOUT'} the plugin"
        findings.append(Finding(Level.NOTE, "ktransformers", detail))
    names = {finding.what for finding in findings}
    if required is not None and required not in names:
        fix = f"pip install 'k26-plugins[{required}]'"
        remedy = f"{fix} in an environment of its own"
        findings.append(Finding(Level.BAD, required, "not installed here", remedy, fix))
    elif not findings:
        findings.append(Finding(Level.NOTE, "engines", "none is installed here"))
    return findings


def _probe(engine: str, module: str) -> list[Finding]:
    command = [sys.executable, "-m", module]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        return [
            Finding(Level.BAD, engine, f"loading its plugins takes more than {PROBE_SECONDS} s", "start it by hand")
        ]
    answer = next((line for line in reversed(done.stdout.splitlines()) if line.startswith("{")), None)
    if done.returncode or answer is None:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return [Finding(Level.BAD, engine, f"it cannot be asked: {last}", f"see all of it with: {' '.join(command)}")]
    state = json.loads(answer)
    oldest, newest = (numbers(end) for end in state["checked"].split(" to "))
    name = f"{state['package']} {state['version']}"
    findings = []
    if state["active"]:
        findings.append(Finding(Level.OK, engine, f"{name}: the plugin is active"))
    else:
        remedy = "without it the engine's own code serves Kimi-K2.6"
        detail = f"{name}: the plugin is NOT active: {state['why_not']}"
        # The environment variable with the engine's list of plugins, which may leave this plugin out.
        variable = PLUGIN_LISTS[engine]
        fix = state["fix"] or (f"unset {variable}" if variable in os.environ else "")
        findings.append(Finding(Level.BAD, engine, detail, remedy, fix))
    if state.get("no_start"):
        fix = 'export NUMBA_CACHE_DIR="$(mktemp -d)"'
        findings.append(Finding(Level.BAD, f"{engine}: cache", state["no_start"], fix, fix))
    if not oldest <= numbers(state["version"]) <= newest:
        detail = f"{name} is none of the versions checked, {state['checked']}"
        findings.append(Finding(Level.NOTE, engine, detail, "verify the running server: `k26 verify`"))
    return findings
