"""`k26 plan`: say whether the model fits on a machine, and with which command it is served."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import click

from k26_plugins.cli.command import Command, FloatRange, OneOf
from k26_plugins.cli.console import err, fail

if TYPE_CHECKING:
    from k26_plugins.common.model.config import K26Config
    from k26_plugins.operate.machine import Machine
    from k26_plugins.operate.plan.fit import Load
    from k26_plugins.operate.plan.hybrid_speed import Rates
    from k26_plugins.operate.plan.report import Plan

HUB_NAME = "moonshotai/Kimi-K2.6"


class Engine(StrEnum):
    """The engines that a plan can be made for."""

    VLLM = "vllm"
    SGLANG = "sglang"
    KTRANSFORMERS = "ktransformers"


class KvDtype(StrEnum):
    """The dtypes of a KV cache."""

    BF16 = "bf16"
    FP8 = "fp8"


_SHARED = (
    click.option("--engine", type=OneOf(Engine), default=Engine.VLLM.value, help="Which engine serves."),
    click.option(
        "--context", type=click.IntRange(min=1), default=131072, help="Tokens of one request, prompt and answer."
    ),
    click.option(
        "--concurrency", type=click.IntRange(min=1), default=1, help="Requests of that length at the same time."
    ),
    click.option(
        "--images",
        type=click.IntRange(min=0),
        default=0,
        help="Images of the largest size in each request, beside the context.",
    ),
    click.option("--kv-dtype", type=OneOf(KvDtype), default=KvDtype.BF16.value, help="Of the KV cache."),
    click.option(
        "--gpu-memory-utilization",
        type=FloatRange(min=0.05, max=1.0),
        default=0.9,
        help="Share of each GPU's memory that the engine may use.",
    ),
    click.option(
        "--ram", type=float, help="System memory, GB, for the hybrid run. [default: this machine's, without --gpus]"
    ),
    click.option(
        "--cores",
        type=click.IntRange(min=1),
        help="Physical CPU cores, for the hybrid run's command. [default: this machine's]",
    ),
    click.option(
        "--sockets",
        type=click.IntRange(min=1),
        help="CPU sockets (NUMA nodes), for the hybrid run's command. [default: this machine's]",
    ),
)

ram_bandwidth_option = click.option(
    "--ram-bandwidth", type=float, help="Of system memory, GB/s: bounds the hybrid run's speed."
)


def planning_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add to a command the options that `k26 plan` and `k26 serve` share, in the order in which help shows them."""
    for option in reversed(_SHARED):
        command = option(command)
    return command


@click.command(cls=Command)
@click.option("--gpus", help="Such as 8xH200, 4x'RTX 4090 48GB' or memory in GiB: 8x96. [default: this machine's]")
@planning_options
@ram_bandwidth_option
@click.option(
    "--measure",
    is_flag=True,
    help="Measure this machine's CPU and links, a few seconds: predicts the hybrid run's speed.",
)
@click.option("--checkpoint", default=HUB_NAME, help="A folder, or a name on the hub for the published sizes.")
@click.option(
    "--compare/--no-compare", default=False, help="A table of all engines and layouts of this machine, no command."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(
    gpus: str | None,
    engine: Engine,
    context: int,
    concurrency: int,
    images: int,
    kv_dtype: KvDtype,
    gpu_memory_utilization: float,
    ram: float | None,
    ram_bandwidth: float | None,
    cores: int | None,
    sockets: int | None,
    measure: bool,
    checkpoint: str,
    compare: bool,
    as_json: bool,
) -> None:
    """Say whether Kimi-K2.6 fits on a machine, why, what is left for the KV cache, and the exact launch command.

    Without --gpus it plans for this machine. It adds up, from the table of tensors, the weights by part on each rank,
    activations, what engines keep for themselves (fitted to the published runs of vLLM in docs/hardware.md), and a KV
    cache of 70,272 bytes a token, which plain tensor parallelism repeats on every GPU. If the load does not fit, loads
    that do are named, each as options of this command. If the GPUs are in several machines, each machine gets a
    command. --compare puts all engines and layouts into one table.

    Speeds are bounds from published bandwidths; nobody measured them. With --measure the speeds of a hybrid run are
    predicted from measurements of this machine's CPU and links, for the GPUs given or its own, and prompts are cut into
    chunks of the size with which a request of the context's length ends first.

    Exits with 0 if the load fits and with 1 if it does not.
    """
    from k26_plugins.operate.plan import report

    if compare:
        _compare(
            gpus, load_of(context, concurrency, images, kv_dtype, gpu_memory_utilization), ram, checkpoint, as_json
        )
        return
    load = load_of(context, concurrency, images, kv_dtype, gpu_memory_utilization)
    made = plan_for(gpus, engine, load, ram, ram_bandwidth, cores, sockets, checkpoint, measure=measure)
    click.echo(json.dumps(report.as_json(made), indent=1) if as_json else report.as_text(made))
    if not made.fits:
        raise click.exceptions.Exit(1)


def _compare(gpus: str | None, load: Load, ram: float | None, checkpoint: str, as_json: bool) -> None:
    from k26_plugins.operate.plan.compare import as_table, compare

    config, machine = _of(gpus, ram, None, None, None, checkpoint, load)
    rows = compare(config, machine, load)
    click.echo(json.dumps([asdict(row) for row in rows], indent=1) if as_json else as_table(rows))
    if not any(row.fits for row in rows):
        raise click.exceptions.Exit(1)


def load_of(context: int, concurrency: int, images: int, kv_dtype: KvDtype, memory_fraction: float) -> Load:
    """Return the load that the options describe.

    context: tokens of one request. images: number in each request. memory_fraction: share of each GPU's memory.
    """
    from k26_plugins.operate.plan.fit import SEQUENCES, Load

    return Load(
        context=context,
        concurrency=concurrency,
        images=images,
        kv_dtype=kv_dtype.value,
        memory_fraction=memory_fraction,
        sequences=max(SEQUENCES, concurrency),
    )


def plan_for(
    gpus: str | None,
    engine: Engine,
    load: Load,
    ram: float | None,
    ram_bandwidth: float | None,
    cores: int | None,
    sockets: int | None,
    checkpoint: str,
    *,
    measure: bool = False,
) -> Plan:
    """Return the plan that the options describe; end the command if there can be no such plan.

    ram: GB. ram_bandwidth: GB/s. gpus, ram, cores, sockets: None for this machine's.
    """
    from k26_plugins.operate.plan.report import make_plan
    from k26_plugins.operate.plan.weights import LayoutError

    if measure and engine is not Engine.KTRANSFORMERS:
        fail("--measure is for --engine ktransformers: the other engines' experts are all on the GPUs.")
    config, machine = _of(gpus, ram, ram_bandwidth, cores, sockets, checkpoint, load)
    if measure and machine.gpu.bandwidth is None:
        fail(f"no bandwidth is known of {machine.gpu.name}: name the GPUs for a prediction, such as --gpus 2xRTX4090.")
    rates = _measured(config) if measure else None
    try:
        return make_plan(config, engine.value, machine, load, checkpoint, rates)
    except LayoutError as error:
        fail(error)


def _measured(config: K26Config) -> Rates:
    """Measure this machine's rates; end the command if no backend computes experts on its CPU."""
    from k26_plugins.common.experts import ExpertsError
    from k26_plugins.operate.hybrid_rates import measure

    try:
        with err().status("measuring the CPU's experts and the links to the GPUs"):
            return measure(config.text)
    except (ExpertsError, ValueError) as error:
        fail(error)


def _of(
    gpus: str | None,
    ram: float | None,
    ram_bandwidth: float | None,
    cores: int | None,
    sockets: int | None,
    checkpoint: str,
    load: Load,
) -> tuple[K26Config, Machine]:
    """Return the model and the machine that the options describe.

    The command ends if an option is wrong, or if a request of the load is longer than the model allows.
    """
    from k26_plugins.common.model.config import ConfigError, K26Config
    from k26_plugins.operate.accelerators import AcceleratorError
    from k26_plugins.operate.machine import machine_of
    from k26_plugins.operate.plan.hardware import HardwareError

    try:
        config = K26Config() if is_hub_name(checkpoint) else K26Config.from_path(checkpoint)
        machine = machine_of(gpus, ram, ram_bandwidth, cores, sockets)
        longest = load.tokens // load.concurrency
        if longest > config.text.max_position_embeddings:
            fail(f"a request of {longest:,} tokens is longer than the model's {config.text.max_position_embeddings:,}.")
        return config, machine
    except (AcceleratorError, ConfigError, HardwareError) as error:
        fail(error)


def is_hub_name(checkpoint: str) -> bool:
    """Return whether `checkpoint` can only be a name on the hub: it has two words, and no such folder is here."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", checkpoint) is not None and not Path(checkpoint).exists()
