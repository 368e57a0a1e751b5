"""Plan, doctor, then the engine's own command."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from k26_plugins.cli.console import Folder, err, fail
from k26_plugins.cli.doctor import show
from k26_plugins.cli.plan import (
    Concurrency,
    Context,
    Cores,
    Engine,
    EngineOption,
    Images,
    KvDtype,
    KvDtypeOption,
    Ram,
    Sockets,
    plan_for,
)


def serve(
    context_of_command: typer.Context,
    folder: Folder,
    engine: EngineOption = Engine.VLLM,
    gpus: Annotated[str | None, typer.Option(help="As for `k26 plan`; by default those of this machine.")] = None,
    context: Context = 131072,
    concurrency: Concurrency = 1,
    images: Images = 0,
    kv_dtype: KvDtypeOption = KvDtype.BF16,
    ram: Ram = None,
    cores: Cores = 64,
    sockets: Sockets = 2,
    anyway: Annotated[bool, typer.Option(help="Start although the doctor found something bad.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Print the command and stop.")] = False,
) -> None:
    """Plan, look at the environment, and start the engine's own command, which is printed first.

    What follows -- goes to the engine as it is: k26 serve --engine vllm DIR -- --port 8001

    Without a GPU there is nothing to plan, and the engine's CPU command is started (vLLM and SGLang).
    """
    from k26_plugins.operate.doctor import Level, examine
    from k26_plugins.operate.plan.command import cpu_command, shown
    from k26_plugins.operate.plan.report import as_text

    found = gpus or _own_gpus()
    if found is None:
        if engine == Engine.KTRANSFORMERS:
            fail("KTransformers needs a GPU and this machine shows none: see `k26 doctor`.")
        command = cpu_command(engine.value, str(folder))
    else:
        made = plan_for(found, engine, context, concurrency, images, kv_dtype, ram, None, cores, sockets, str(folder))
        err.print(as_text(made), highlight=False, markup=False, soft_wrap=True)
        if made.command is None:
            raise typer.Exit(1)
        command = made.command
    with err.status("looking at this environment"):
        bad = [finding for finding in examine(folder, engine.value) if finding.level == Level.BAD]
    if bad:
        show(bad)
        if not anyway:
            fail("this would not serve as it should: mend it, or give --anyway.")
    command += context_of_command.args
    typer.echo(shown(command))
    if dry_run:
        return
    sys.stdout.flush()
    if command[0] == "python":
        command[0] = sys.executable
    try:
        os.execvp(command[0], command)
    except OSError as error:
        fail(f"{command[0]} cannot be started ({error.strerror}): is {engine.value} installed here?")


def _own_gpus() -> str | None:
    """This machine's GPUs as `--gpus` takes them, by the memory of the smallest; None without one."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return None
    smallest = min(torch.cuda.mem_get_info(index)[1] for index in range(count))
    return f"{count}x{smallest / 2**30:.1f}"
