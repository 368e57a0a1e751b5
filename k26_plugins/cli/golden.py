"""`k26 golden`: compute golden logits from the real checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from k26_plugins.cli.command import PATH, Command
from k26_plugins.cli.console import err, fail, folder_argument, progress_bar
from k26_plugins.cli.reports import require_writable

if TYPE_CHECKING:
    from k26_plugins.operate.golden import Golden, GoldenJob

# A rank test needs this many tokens of an expert to reach the score from which on a fault is found: 6 = sqrt(3 · 12).
ENOUGH_TOKENS = 12


@click.command(cls=Command)
@folder_argument
@click.option("--prompts", type=PATH, required=True, help="A file with a prompt a line, as JSON; see below.")
@click.option("--out", type=PATH, required=True, help="The golden file to write (safetensors).")
@click.option(
    "--answer-tokens",
    type=click.IntRange(min=1),
    default=8,
    help="Tokens of each prompt's greedy answer. Each after the first reads experts again.",
)
@click.option("--top-k", type=click.IntRange(min=1), default=64, help="Likeliest tokens to keep at each position.")
def golden(folder: Path, prompts: Path, out: Path, answer_tokens: int, top_k: int) -> None:
    """Compute the reference model's answers, with which `k26 verify` compares an endpoint.

    Needs no GPU and little memory: one layer is in memory at a time, all prompts go through it together, and a routed
    expert is read only if a token chose it. Before it starts, the run says how much memory it takes and how much it
    reads. It may be killed at any time: the same command goes on after the last whole layer, and gives the same file.

    A line of prompts is one of

        {"id": "hello", "messages": [{"role": "user", "content": "Hello"}]}

        {"id": "photo", "messages": [{"role": "user", "content": [{"type": "image", "image": "photo.png"}]}]}

        {"id": "raw", "text": "The capital of France is"}

    Beside messages, a line may have "thinking": false and "tools": [...]. Twenty prompts of a few hundred tokens are
    plenty.
    """
    from k26_plugins.common.checkpoint import CheckpointError, StreamedCheckpoint
    from k26_plugins.common.model.config import ConfigError
    from k26_plugins.common.multimodal.image import MediaError
    from k26_plugins.common.prompt.tokenizer import TokenizerError
    from k26_plugins.operate.golden import GoldenJob, PromptError, StateError, read_prompts

    require_writable(out)
    expected = (CheckpointError, ConfigError, MediaError, PromptError, StateError, TokenizerError, OSError)
    try:
        with StreamedCheckpoint(folder) as checkpoint:
            with err().status("reading headers and prompts"):
                job = GoldenJob(checkpoint, read_prompts(prompts, folder), out, top_k, answer_tokens)
            click.echo(_what_it_takes(job))
            begin = time.perf_counter()
            with progress_bar() as progress:
                task = progress.add_task("layers", total=job.steps)
                made = job.run(lambda done: progress.update(task, completed=done))
            seconds = time.perf_counter() - begin
    except expected as error:
        fail(error)
    rate = checkpoint.bytes_read / seconds / 1e9
    click.echo(_what_experts_saw(made))
    click.echo(f"{out}: {checkpoint.bytes_read / 1e9:.2f} GB read in {seconds:.0f} s ({rate:.2f} GB/s).")


def _what_experts_saw(made: Golden) -> str:
    """Return in words how many tokens the experts saw, and how many experts saw too few for a fault to be found."""
    tokens = made.tokens_by_expert().flatten()
    if not tokens.numel():
        return "no routed experts"
    few = int((tokens < ENOUGH_TOKENS).sum())
    remedy = ": a fault of theirs stays unseen, longer or more prompts show it" if few else ""
    return (
        f"each of {len(tokens):,} experts saw {tokens.min():,} to {tokens.max():,} tokens, half of them at least "
        f"{tokens.median():,}; {few:,} saw fewer than {ENOUGH_TOKENS}{remedy}"
    )


def _what_it_takes(job: GoldenJob) -> str:
    """Return in words how much a run will read, how much memory it will take, and where it keeps its state."""
    stage = max(job.stages, key=job.stages.__getitem__)
    total = sum(spec.num_bytes for spec in job.checkpoint.table.values())
    return (
        f"{len(job.prompts)} prompts, {job.carried.tokens:,} tokens, {job.num_passes} passes over at most "
        f"{total / 1e9:.2f} GB each. Peak memory: {job.peak_bytes / 1e9:.2f} GB ({stage}) and what Python and PyTorch "
        f"take themselves. State until it is done: {job.state_folder}"
    )
