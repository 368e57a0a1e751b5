"""Agent-swarm traffic against a running server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from k26_plugins.cli.console import fail, progress_bar
from k26_plugins.cli.reports import HtmlOut, JsonOut, require_plots, require_writable, write

NOT_HELD = 1
NOT_ASKED = 2


def swarm(
    url: Annotated[str, typer.Option(help="The server, such as http://localhost:8000.", show_default=False)],
    agents: Annotated[int, typer.Option(min=1, help="Sub-agents, all working at once.")] = 300,
    steps: Annotated[int, typer.Option(min=1, help="Requests in all, the orchestrator's among them.")] = 4000,
    prefix_tokens: Annotated[
        int,
        typer.Option(
            min=0,
            help="Length of the records that all share, beside the system prompt and four tools. Without --checkpoint "
            "four characters count as a token.",
        ),
    ] = 4000,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Longest answer to a step.")] = 48,
    images: Annotated[float, typer.Option(min=0, max=1, help="Share of agents whose task has an image.")] = 0.1,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Closed loop: requests at once. As many as agents by default.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(min=0.001, help="Open loop: Poisson arrivals a second, in place of --concurrency.")
    ] = None,
    tool_latency: Annotated[float, typer.Option(min=0, help="Mean seconds that a tool takes.")] = 0.2,
    thinking: Annotated[bool, typer.Option(help="Let the model think before it answers.")] = False,
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The served checkpoint: every prompt's tokens are held against it."),
    ] = None,
    secrets: Annotated[
        bool | None, typer.Option(help="Whether agents must know their code words; by default the model is tried.")
    ] = None,
    replays: Annotated[int, typer.Option(min=0, help="Steps that are asked again alone in the end.")] = 40,
    deterministic: Annotated[
        bool, typer.Option(help="Those must be answered word for word as before: for batch-invariant servers.")
    ] = False,
    hostile: Annotated[int, typer.Option(min=0, help="Hostile requests during the run.")] = 0,
    drops: Annotated[int, typer.Option(min=0, help="Clients that hang up in the middle of an answer.")] = 0,
    pid: Annotated[
        int | None, typer.Option(help="The server's process, for its memory. Found by the port on this machine.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Everything sent follows from it.")] = 0,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds without a byte until a request is lost.")] = 600,
    model: Annotated[str | None, typer.Option(help="Which model, where the server has several.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="Where the server wants one.")] = None,
    json_out: JsonOut = None,
    html_out: HtmlOut = None,
) -> None:
    """Send an agent swarm's traffic to a running server, and say how fast and how rightly it was served.

    An orchestrator splits a task; sub-agents with one long shared prefix work on it side by side, over many turns with
    tool calls, tools that take their time, and images; the orchestrator merges their results. Everything follows from
    --seed. Times, throughput, the engine's own prefix-cache hit rate, and the server's memory are reported.

    Whether any agent lost or mixed up its conversation is found in three ways: each carries a code word that must come
    back (where the model is able to repeat one), each prompt must have exactly the tokens that the core counts (with
    --checkpoint; by their ids in vLLM and SGLang), and some steps are asked again alone, whose answers must be theirs.

    --hostile and --drops put faults beside the load: broken JSON, absurd sizes, corrupt media, injected control tokens, deep
    tool schemas; streams that are left. Every hostile request must be refused or answered, without an error of the
    server's own.

    A small trial: k26 swarm --url http://localhost:8000 --agents 20 --steps 100

    Exits with 0 where the server holds, with 1 where something was lost, mixed up or failed, and with 2 where it could not
    be asked.
    """
    import asyncio

    import httpx

    from k26_plugins.common.config import ConfigError
    from k26_plugins.common.prompt.tokenizer import TokenizerError
    from k26_plugins.operate.swarm.accounting import Accountant
    from k26_plugins.operate.swarm.client import OK, Step
    from k26_plugins.operate.swarm.judge import Verdict, figures_of, judge
    from k26_plugins.operate.swarm.memory import server_pid
    from k26_plugins.operate.swarm.report import as_html, as_json, as_text
    from k26_plugins.operate.swarm.run import Load, Run, Swarm
    from k26_plugins.operate.swarm.scenario import Shape, ShapeError, shared_prefix
    from k26_plugins.operate.verify.endpoint import EndpointError, asks_environment, connect

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
        hostile=hostile,
    )

    async def send() -> tuple[Run, bool]:
        # A connection for each request: a server whose loop was busy closes idle ones just when they are used again, which
        # looks like an error of its own.
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
    typer.echo(as_text(endpoint.url, endpoint.engine, figures, verdict))
    if accountant is None:
        typer.echo("  not shown: whether prompts held their tokens. Give --checkpoint.")
    if not repeats:
        typer.echo("  not shown: code words. This model does not repeat one.")
    write(json_out, lambda: json.dumps(as_json(endpoint.url, endpoint.engine, run, figures, verdict)) + "\n")
    write(html_out, lambda: as_html(endpoint.url, endpoint.engine, run, figures, verdict))
    if not verdict.passed:
        raise typer.Exit(NOT_HELD)
