"""`k26 tune`: find out which kernels compute the experts fastest on this GPU, among those that are right."""

from __future__ import annotations

from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from k26_plugins.cli.command import PATH, Command, OneOf
from k26_plugins.cli.console import fail, out, progress_bar
from k26_plugins.cli.plan import HUB_NAME, is_hub_name
from k26_plugins.cli.reports import require_writable
from k26_plugins.common.purpose import Purpose

if TYPE_CHECKING:
    from k26_plugins.operate.tune.routing import Layer


class Engine(StrEnum):
    """The engines whose kernels `k26 tune` can compare with the core's."""

    VLLM = "vllm"
    SGLANG = "sglang"


@click.command(cls=Command)
@click.option("--tp", type=click.IntRange(min=1), default=1, help="Ranks that each expert is cut for.")
@click.option(
    "--ep",
    type=click.IntRange(min=1),
    default=1,
    help="Ranks that the experts are dealt out to; vLLM's -tp 8 with expert parallel: 8.",
)
@click.option("--engine", type=OneOf(Engine), help="Whose kernels are compared. [default: the one that is installed]")
@click.option(
    "--for",
    "purpose",
    type=OneOf(Purpose),
    default=Purpose.BOTH.value,
    help="Which batches the server is for.",
)
@click.option("--quick/--no-quick", default=False, help="Five sizes, even routing, no search for tiles.")
@click.option("--checkpoint", default=HUB_NAME, help="A folder, or a name on the hub for the published sizes.")
@click.option("--save", type=PATH, help="Where the outcome goes. [default: the cache folder]")
@click.option("--plot", type=PATH, help="Write a plot, such as tune.png.")
def tune(
    tp: int,
    ep: int,
    engine: Engine | None,
    purpose: Purpose,
    quick: bool,
    checkpoint: str,
    save: Path | None,
    plot: Path | None,
) -> None:
    """Time the core's kernels and the engine's for the INT4 experts on this GPU, so that servers take what wins.

    The weights are random and have the sizes of one rank; batches have 1 to 16,384 tokens, with even and with skewed
    routing. First the fastest tiles for the core's kernels are searched, then every kernel is timed, in CUDA graphs up
    to 512 tokens.

    The outcome goes to the cache folder, under the GPU, driver, Triton, torch, engine version and sizes. A server for
    which all of these are the same takes the core's kernels if they are faster by 3 % or more with an error that is no
    larger, and the engine's own kernels otherwise. Give --tp and --ep as the server has them, and keep the GPU idle.
    """
    from k26_plugins.common.experts.outcome import outcome_file, write_outcome
    from k26_plugins.common.experts.rule import choose
    from k26_plugins.operate.tune.measure import FULL, QUICK
    from k26_plugins.operate.tune.report import as_table, notes
    from k26_plugins.operate.tune.report import plot as draw
    from k26_plugins.operate.tune.run import Run

    if plot is not None and find_spec("matplotlib") is None:
        fail("--plot needs matplotlib. pip install 'k26-plugins[report]'")
    require_writable(plot, save)
    layer = _layer(checkpoint, tp, ep)
    try:
        run = Run(layer, engine, QUICK if quick else FULL)
    except ValueError as error:
        fail(error)
    file = save or outcome_file(run.key)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"{file.parent} cannot be made ({error.strerror}): give --save, or set XDG_CACHE_HOME.")
    require_writable(file)
    with progress_bar() as bar:
        task = bar.add_task("weights")
        outcome = run.outcome(
            purpose,
            on_begin=lambda steps: bar.update(task, total=steps),
            on_step=lambda step: bar.update(task, description=step, advance=1),
        )
    write_outcome(outcome, file)
    out().print(as_table(outcome))
    for note in notes(outcome):
        out().print(note, highlight=False, markup=False, soft_wrap=True)
    choice = choose(outcome.timings, outcome.purpose)
    click.echo(f"chosen: {choice.kernel or 'the engine itself'}: {choice.why}")
    click.echo(f"outcome: {file}")
    if plot is not None:
        draw(outcome, plot)


def _layer(checkpoint: str, tp: int, ep: int) -> Layer:
    """Return a rank's part of a layer of this model; end the command if the layer cannot be divided so."""
    from k26_plugins.common.model.config import ConfigError, K26Config
    from k26_plugins.operate.tune.routing import Layer

    try:
        config = K26Config() if is_hub_name(checkpoint) else K26Config.from_path(checkpoint)
        return Layer.of_rank(config.text, tp, ep)
    except (ConfigError, ValueError) as error:
        fail(error)
