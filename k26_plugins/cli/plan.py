"""Does it fit, and what is the command."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from k26_plugins.cli.console import fail

if TYPE_CHECKING:
    from k26_plugins.operate.plan.report import Plan

HUB_NAME = "moonshotai/Kimi-K2.6"


class Engine(StrEnum):
    VLLM = "vllm"
    SGLANG = "sglang"
    KTRANSFORMERS = "ktransformers"


class KvDtype(StrEnum):
    BF16 = "bf16"
    FP8 = "fp8"


Gpus = Annotated[str, typer.Option(help="Such as 8xH200 or 'RTX 4090', or memory in GiB: 8x96.", show_default=False)]
EngineOption = Annotated[Engine, typer.Option(help="Which engine serves.")]
Context = Annotated[int, typer.Option(min=1, help="Tokens of one request, prompt and answer.")]
Concurrency = Annotated[int, typer.Option(min=1, help="Requests of that length at the same time.")]
Images = Annotated[int, typer.Option(min=0, help="Images of the largest size in each request, beside the context.")]
KvDtypeOption = Annotated[KvDtype, typer.Option(help="Of the KV cache.")]
Ram = Annotated[float | None, typer.Option(help="System memory, GB. The hybrid run needs it.")]
RamBandwidth = Annotated[float | None, typer.Option(help="Of system memory, GB/s: bounds the hybrid run's speed.")]
Cores = Annotated[int, typer.Option(min=1, help="Physical CPU cores, for the hybrid run's command.")]
Sockets = Annotated[int, typer.Option(min=1, help="CPU sockets (NUMA nodes), for the hybrid run's command.")]


def plan(
    gpus: Gpus,
    engine: EngineOption = Engine.VLLM,
    context: Context = 131072,
    concurrency: Concurrency = 1,
    images: Images = 0,
    kv_dtype: KvDtypeOption = KvDtype.BF16,
    ram: Ram = None,
    ram_bandwidth: RamBandwidth = None,
    cores: Cores = 64,
    sockets: Sockets = 2,
    checkpoint: Annotated[str, typer.Option(help="A folder, or a name on the hub for the published sizes.")] = HUB_NAME,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say whether Kimi-K2.6 fits on a machine, why, what is left for the KV cache, and the exact launch command.

    Computed from the table of tensors, without a GPU: weights by part on each rank, activations, what engines keep for
    themselves (calibrated on the one published run, 8 × H200), and KV cache of 70,272 bytes a token, which plain tensor
    parallelism repeats on every GPU. Where the load does not fit, the nearest thing that does is named.

    Speeds are bounds from published bandwidths; nobody measured them.

    Exits with 0 where it fits and with 1 where it does not.
    """
    from k26_plugins.operate.plan import report

    made = plan_for(
        gpus, engine, context, concurrency, images, kv_dtype, ram, ram_bandwidth, cores, sockets, checkpoint
    )
    typer.echo(json.dumps(report.as_json(made), indent=1) if as_json else report.as_text(made))
    if not made.fits:
        raise typer.Exit(1)


def plan_for(
    gpus: str,
    engine: Engine,
    context: int,
    concurrency: int,
    images: int,
    kv_dtype: KvDtype,
    ram: float | None,
    ram_bandwidth: float | None,
    cores: int,
    sockets: int,
    checkpoint: str,
) -> Plan:
    """The plan of these options; ends the command on one that cannot be."""
    from k26_plugins.common.config import ConfigError, K26Config
    from k26_plugins.operate.plan.fit import Load
    from k26_plugins.operate.plan.hardware import HardwareError, parse
    from k26_plugins.operate.plan.report import Machine, make_plan
    from k26_plugins.operate.plan.weights import LayoutError

    try:
        config = K26Config.from_path(checkpoint) if Path(checkpoint).exists() else K26Config()
        count, gpu = parse(gpus)
        machine = Machine(
            gpu=gpu,
            count=count,
            ram=None if ram is None else int(ram * 1e9),
            ram_bandwidth=None if ram_bandwidth is None else ram_bandwidth * 1e9,
            cores=cores,
            sockets=sockets,
        )
        load = Load(context=context, concurrency=concurrency, images=images, kv_dtype=kv_dtype.value)
        longest = load.tokens // concurrency
        if longest > config.text.max_position_embeddings:
            fail(f"a request of {longest:,} tokens is longer than the model's {config.text.max_position_embeddings:,}.")
        return make_plan(config, engine.value, machine, load, checkpoint)
    except (ConfigError, HardwareError, LayoutError) as error:
        fail(error)
