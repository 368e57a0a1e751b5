"""`k26 serve`: make a plan, examine the environment, then start the engine's own command."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from k26_plugins.cli.command import Command
from k26_plugins.cli.console import err, fail, folder_argument, out
from k26_plugins.cli.doctor import show
from k26_plugins.cli.plan import Engine, KvDtype, load_of, plan_for, planning_options


# Arguments after `--` are not ours but the engine's.
@click.command(cls=Command, context_settings={"allow_extra_args": True})
@folder_argument
@click.option("--gpus", help="As for `k26 plan`; by default those of this machine.")
@planning_options
@click.option("--anyway/--no-anyway", default=False, help="Start although the doctor found something bad.")
@click.option("--dry-run/--no-dry-run", default=False, help="Print the command and stop.")
@click.pass_context
def serve(
    context_of_command: click.Context,
    folder: Path,
    engine: Engine,
    gpus: str | None,
    context: int,
    concurrency: int,
    images: int,
    kv_dtype: KvDtype,
    gpu_memory_utilization: float,
    ram: float | None,
    cores: int | None,
    sockets: int | None,
    anyway: bool,
    dry_run: bool,
) -> None:
    """Make a plan, examine the environment, and start the engine's own command, which is printed first.

    Arguments after -- are passed to the engine unchanged: k26 serve --engine vllm DIR -- --port 8001

    Without a GPU there is nothing to plan, and the engine is started with its command for a CPU (vLLM and SGLang).
    """
    from k26_plugins.operate.doctor import Level, examine
    from k26_plugins.operate.plan.command import plain_command, shown
    from k26_plugins.operate.plan.report import as_text

    if _is_other_layout(folder):
        if engine == Engine.KTRANSFORMERS:
            fail("KTransformers reads the published layout only.")
        err().print("another layout of this architecture: nothing is planned for it.")
        command = plain_command(engine.value, str(folder), None if gpus or _has_gpu() else "cpu")
    elif gpus is None and not _has_gpu():
        if engine == Engine.KTRANSFORMERS:
            fail("KTransformers needs a GPU and this machine shows none: see `k26 doctor`.")
        command = plain_command(engine.value, str(folder), "cpu")
    else:
        load = load_of(context, concurrency, images, kv_dtype, gpu_memory_utilization)
        made = plan_for(gpus, engine, load, ram, None, cores, sockets, str(folder))
        err().print(as_text(made), highlight=False, markup=False, soft_wrap=True)
        if not made.fits:
            raise click.exceptions.Exit(1)
        if len(made.commands) > 1:
            fail(f"this plan is for {len(made.commands)} machines: start the commands above, one on each.")
        command = made.commands[0]
    with err().status("looking at this environment"):
        bad = [finding for finding in examine(folder, engine.value, measure=False) if finding.level == Level.BAD]
    if bad:
        show(bad, out())
        if not anyway:
            fail("this would not serve as it should: mend it, or give --anyway.")
    command += context_of_command.args
    click.echo(shown(command))
    if dry_run:
        return
    sys.stdout.flush()
    command[0] = _beside_python(command[0])
    # The engine starts compilers and other programs of this environment by name, so they must be found on PATH.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    try:
        os.execvp(command[0], command)
    except OSError as error:
        fail(f"{command[0]} cannot be started ({error.strerror}): is {engine.value} installed here?")


def _beside_python(program: str) -> str:
    """Return the path of a program in the environment that runs this command.

    PATH is not asked, because a service's PATH often does not have the environment. A program that the environment does
    not have is returned as it is.
    """
    if program == "python":
        return sys.executable
    beside = Path(sys.executable).with_name(program)
    return str(beside) if beside.exists() else program


def _is_other_layout(folder: Path) -> bool:
    """Return whether the checkpoint has another layout than the published one; False if it cannot be read."""
    from k26_plugins.common.checkpoint import CheckpointError, Layout, classify_folder
    from k26_plugins.common.model.config import ConfigError

    try:
        return classify_folder(folder).layout is not Layout.PUBLISHED
    except (CheckpointError, ConfigError):
        return False  # the doctor reports the error, and --anyway starts the engine all the same


def _has_gpu() -> bool:
    """Return whether this machine has a GPU; end the command if the drivers cannot be asked."""
    from k26_plugins.operate.accelerators import AcceleratorError, accelerators

    try:
        return bool(accelerators())
    except AcceleratorError as error:
        fail(error)
