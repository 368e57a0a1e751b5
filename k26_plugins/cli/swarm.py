"""`k26 swarm`: send an agent swarm's traffic to a running server."""

from __future__ import annotations

import json
from pathlib import Path

import click

from k26_plugins.cli.command import PATH, Command, FloatRange
from k26_plugins.cli.console import fail, progress_bar
from k26_plugins.cli.reports import html_option, json_option, require_plots, require_writable, write
from k26_plugins.cli.verify import api_key_option, model_option, url_option

NOT_HELD = 1
NOT_ASKED = 2


@click.command(cls=Command)
@url_option
@click.option("--agents", type=click.IntRange(min=1), default=300, help="Sub-agents, all working at once.")
@click.option(
    "--steps", type=click.IntRange(min=1), default=4000, help="Requests in all, the orchestrator's among them."
)
@click.option(
    "--prefix-tokens",
    type=click.IntRange(min=0),
    default=4000,
    help="Length of the records that all share, beside the system prompt and four tools. Without --checkpoint four "
    "characters count as a token.",
)
@click.option("--answer-tokens", type=click.IntRange(min=1), default=48, help="Longest answer to a step.")
@click.option("--images", type=FloatRange(min=0, max=1), default=0.1, help="Share of agents whose task has an image.")
@click.option(
    "--concurrency", type=click.IntRange(min=1), help="Closed loop: requests at once. As many as agents by default."
)
@click.option(
    "--rate", type=FloatRange(min=0.001), help="Open loop: Poisson arrivals a second, in place of --concurrency."
)
@click.option("--tool-latency", type=FloatRange(min=0), default=0.2, help="Mean seconds that a tool takes.")
@click.option("--thinking/--no-thinking", default=False, help="Let the model think before it answers.")
@click.option(
    "--checkpoint",
    type=PATH,
    metavar="DIR",
    help="The served checkpoint: every prompt's tokens are held against it.",
)
@click.option(
    "--secrets/--no-secrets",
    default=None,
    help="Whether agents must know their code words; by default the model is tried.",
)
@click.option("--replays", type=click.IntRange(min=0), default=40, help="Steps that are asked again alone in the end.")
@click.option(
    "--deterministic/--no-deterministic",
    default=False,
    help="Those must be answered word for word as before: for batch-invariant servers.",
)
@click.option("--adversarial", type=click.IntRange(min=0), default=0, help="Adversarial requests during the run.")
@click.option("--drops", type=click.IntRange(min=0), default=0, help="Clients that hang up in the middle of an answer.")
@click.option("--pid", type=int, help="The server's process, for its memory. Found by the port on this machine.")
@click.option("--seed", default=0, help="Everything sent follows from it.")
@click.option("--timeout", type=FloatRange(min=1), default=600, help="Seconds without a byte until a request is lost.")
@model_option
@api_key_option
@json_option
@html_option
def swarm(
    url: str,
    agents: int,
    steps: int,
    prefix_tokens: int,
    answer_tokens: int,
    images: float,
    concurrency: int | None,
    rate: float | None,
    tool_latency: float,
    thinking: bool,
    checkpoint: Path | None,
    secrets: bool | None,
    replays: int,
    deterministic: bool,
    adversarial: int,
    drops: int,
    pid: int | None,
    seed: int,
    timeout: float,
    model: str | None,
    api_key: str | None,
    json_out: Path | None,
    html_out: Path | None,
) -> None:
    """Send an agent swarm's traffic to a running server, and report how fast and how correctly it was served.

    An orchestrator splits a task. Sub-agents with one long shared prefix work on it at the same time, over many turns
    with tool calls, tools that take their time, and images. Then the orchestrator merges their results. Everything that
    is sent follows from --seed. The report has times, throughput, the engine's own prefix-cache hit rate, and the
    server's memory.

    Three checks find an agent whose conversation was lost or mixed up with another's. Each agent has a code word that
    must come back, if the model is able to repeat one. Each prompt must have exactly the tokens that the core counts
    (with --checkpoint; compared by their ids in vLLM and SGLang). Some steps are asked again alone in the end, to see
    that each answer under load belonged to its own conversation (word for word only with --deterministic).

    --adversarial and --drops add faults to the load: broken JSON, absurd sizes, corrupt media, injected control tokens,
    deep tool schemas; clients that hang up in the middle of a stream. Every adversarial request must be refused or
    answered, without an error of the server's own.

    A small trial: k26 swarm --url http://localhost:8000 --agents 20 --steps 100

    Exits with 0 if the server holds, with 1 if something was lost, mixed up or failed, and with 2 if the server could
    not be asked.
    """
    import asyncio

    import httpx

    from k26_plugins.common.model.config import ConfigError
    from k26_plugins.common.prompt.tokenizer import TokenizerError
    from k26_plugins.operate.swarm.accounting import Accountant
    from k26_plugins.operate.swarm.client import OK, Step
    from k26_plugins.operate.swarm.judge import Verdict, figures_of, judge
    from k26_plugins.operate.swarm.memory import server_pid
    from k26_plugins.operate.swarm.report import as_html, as_json, as_text
    from k26_plugins.operate.swarm.run import Load, Run, Swarm
    from k26_plugins.operate.swarm.scenario import Shape, ShapeError, shared_prefix
    from k26_plugins.operate.verify.connect import asks_environment, connect
    from k26_plugins.operate.verify.endpoint import EndpointError

    require_plots(html_out, NOT_ASKED)
    require_writable(json_out, html_out, code=NOT_ASKED)
    shape = Shape(
        agents=agents,
        steps=steps,
        prefix_tokens=prefix_tokens,
        answer_tokens=answer_tokens,
        images=images,
        seed=seed,
    )
    load = Load(
        concurrency=concurrency,
        rate=rate,
        tool_latency=tool_latency,
        thinking=thinking,
        timeout=timeout,
        replays=replays,
        pid=pid or server_pid(url),
        drops=drops,
        adversarial=adversarial,
    )

    async def send() -> tuple[Run, bool]:
        # Each request has its own connection. A server whose event loop was busy closes idle connections just when they
        # are used again, which looks like an error of the server.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        async with httpx.AsyncClient(
            timeout=timeout, limits=limits, headers=headers, trust_env=asks_environment(endpoint.url)
        ) as http:
            swarm = Swarm(
                endpoint.url,
                endpoint.model,
                http,
                shape,
                load,
                prefix=shared_prefix(shape, count),
                extra_body=endpoint.stream_ids if accountant is not None else {},
                on_step=on_step,
            )
            repeats = await swarm.can_repeat()
            return await swarm.go(), repeats if secrets is None else secrets

    failed = 0

    def on_step(step: Step) -> None:
        nonlocal failed
        failed += step.outcome != OK
        progress.update(task, advance=1, description=f"steps, {failed} failed" if failed else "steps")

    try:
        endpoint = connect(url, model, api_key)
        accountant = Accountant(checkpoint) if checkpoint is not None else None
        count = (
            (lambda text: len(accountant.tokenizer.encode(text))) if accountant else (lambda text: -(-len(text) // 4))
        )
        with progress_bar() as progress:
            task = progress.add_task("steps", total=steps)
            run, repeats = asyncio.run(send())
            task = progress.add_task("prompts counted", total=len(run.steps))
            verdict: Verdict = judge(
                run, accountant, secrets=repeats, deterministic=deterministic, on_prompt=lambda: progress.advance(task)
            )
    except (EndpointError, ShapeError, ConfigError, TokenizerError, ConnectionError, OSError) as error:
        fail(error, NOT_ASKED)
    figures = figures_of(run)
    click.echo(as_text(endpoint.url, endpoint.engine, figures, verdict))
    if accountant is None:
        click.echo("  not shown: whether prompts held their tokens. Give --checkpoint.")
    if not repeats:
        click.echo("  not shown: code words. This model does not repeat one.")
    write(json_out, lambda: json.dumps(as_json(endpoint.url, endpoint.engine, run, figures, verdict)) + "\n")
    write(html_out, lambda: as_html(endpoint.url, endpoint.engine, run, figures, verdict))
    if not verdict.passed:
        raise click.exceptions.Exit(NOT_HELD)
