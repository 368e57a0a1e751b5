"""`k26 profile`: count which experts a workload uses, for their placement in a hybrid run."""

from __future__ import annotations

from pathlib import Path

import click

from k26_plugins.cli.command import PATH, Command
from k26_plugins.cli.console import fail, folder_argument, out, progress_bar
from k26_plugins.cli.plan import ram_bandwidth_option
from k26_plugins.cli.reports import require_writable

# Shares of the experts on the GPUs for which the table has a row.
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 3, 1 / 2, 3 / 4)


@click.command(cls=Command)
@folder_argument
@click.option("--prompts", type=PATH, required=True, help="A file with a prompt a line, as for `k26 golden`.")
@click.option("--save", type=PATH, help="Where the profile goes. [default: beside the checkpoint]")
@ram_bandwidth_option
def profile(folder: Path, prompts: Path, save: Path | None, ram_bandwidth: float | None) -> None:
    """Count which experts your prompts use, so that a hybrid run keeps these experts on the GPUs.

    Runs the plain reference model over the prompts, on the CPU. Each expert that a prompt chooses is read from the
    mapped files, so the published checkpoint takes hours. A hybrid run (`--kt-weight-path`) uses the profile that it
    finds beside the checkpoint. The table says which share of the expert uses the GPUs would then serve, and which
    share they would serve with as many experts by number (the first ones) instead.

    The speed is an upper bound: it counts only the time in which the remaining experts are read, once for each token,
    at the bandwidth given. Nobody measured it.
    """
    from rich.table import Table

    from k26_plugins.common.checkpoint import CheckpointError
    from k26_plugins.common.experts.placement import PROFILE_FILE
    from k26_plugins.common.model.config import ConfigError, K26Config
    from k26_plugins.common.multimodal.image import MediaError
    from k26_plugins.common.prompt.tokenizer import TokenizerError
    from k26_plugins.operate.golden import PromptError, read_prompts
    from k26_plugins.operate.plan.hybrid import expert_slot_bytes
    from k26_plugins.operate.profile import profile_experts

    target = save or folder / PROFILE_FILE
    require_writable(target)
    try:
        config = K26Config.from_path(folder)
        ready = read_prompts(prompts, folder)
        with progress_bar() as bar:
            task = bar.add_task("prompts", total=len(ready))
            found = profile_experts(folder, ready, lambda: bar.advance(task))
        found.save(target)
    except (CheckpointError, ConfigError, MediaError, PromptError, TokenizerError, OSError) as error:
        fail(error)
    text = config.text
    token_bytes = expert_slot_bytes(config) * text.num_experts_per_tok
    table = Table("experts on the GPUs", "most used: hits", "first: hits", "tokens/s at most")
    for share in SHARES:
        count = round(share * text.n_routed_experts)
        hits = found.hit_rate(count)
        speed = "-" if ram_bandwidth is None or hits == 1 else f"{ram_bandwidth * 1e9 / (token_bytes * (1 - hits)):.1f}"
        table.add_row(
            f"{count} of {text.n_routed_experts}", f"{hits:.0%}", f"{found.hit_rate_of_first(count):.0%}", speed
        )
    out().print(table)
    click.echo(f"{found.num_tokens:,} tokens; profile: {target}")
