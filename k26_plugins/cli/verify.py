"""`k26 verify` and `k26 compare`: compare a running endpoint with a golden file, or endpoints with each other."""

from __future__ import annotations

import json
from pathlib import Path

import click

from k26_plugins.cli.command import PATH, Argument, Command
from k26_plugins.cli.console import fail, progress_bar
from k26_plugins.cli.reports import html_option, json_option, require_plots, require_writable, write

NOT_RIGHT = 1
NOT_ASKED = 2

url_option = click.option("--url", required=True, help="The server, such as http://localhost:8000.")
model_option = click.option("--model", help="Which model, where the server has several.")
api_key_option = click.option(
    "--api-key", envvar="OPENAI_API_KEY", show_envvar=True, help="Where the server wants one."
)


@click.command(cls=Command)
@url_option
@click.option("--golden", type=PATH, required=True, help="A file of `k26 golden`.")
@model_option
@api_key_option
@click.option("--tools/--no-tools", default=False, help="Ask for tool calls too. The server needs its kimi_k2 parsers.")
@click.option(
    "--conformance/--no-conformance",
    default=False,
    help="Ask what published suites ask too: image token counts, parameters, tool calls by schema.",
)
@click.option(
    "--needle/--no-needle",
    default=False,
    help="Ask for one line of prompts of 8,000, 70,000 and 200,000 tokens too, where they fit.",
)
@json_option
@html_option
def verify(
    url: str,
    golden: Path,
    model: str | None,
    api_key: str | None,
    tools: bool,
    conformance: bool,
    needle: bool,
    json_out: Path | None,
    html_out: Path | None,
) -> None:
    """Compare a running server with golden logits: vLLM, SGLang, KTransformers, or any OpenAI-compatible endpoint.

    Compares the prompts' token ids, and the distributions at every position of the prompts (text and images) and of
    greedy answers. The bounds come from the golden file, which holds what bfloat16 rounding does to each answer. If the
    server is beyond the bounds, the report says from which position on, and what is probably wrong: the router, an
    expert by name, positions, the image path, or the prompt's rendering.

    vLLM and SGLang report whole prompts. A vendor's chat API reports only its answers, so fewer faults can be seen.

    Exits with 0 if the server is right, with 1 if it is not, and with 2 if it could not be asked.
    """
    from k26_plugins.operate.golden import Golden, GoldenError
    from k26_plugins.operate.verify.conformance import CASES, FAIL, PASS, check_conformance
    from k26_plugins.operate.verify.connect import connect
    from k26_plugins.operate.verify.endpoint import EndpointError
    from k26_plugins.operate.verify.judge import Check, judge
    from k26_plugins.operate.verify.measure import measure
    from k26_plugins.operate.verify.needle import DEPTHS, LENGTHS, find_needles
    from k26_plugins.operate.verify.report import as_html, as_json, as_text
    from k26_plugins.operate.verify.tools import REQUESTS, check_tools

    require_plots(html_out, NOT_ASKED)
    require_writable(json_out, html_out, code=NOT_ASKED)
    try:
        expected = Golden.load(golden)
        endpoint = connect(url, model, api_key)
        with progress_bar() as progress:
            task = progress.add_task("prompts", total=len(expected.prompts))
            measured = measure(endpoint, expected, lambda done: progress.update(task, completed=done))
            verdict = judge(expected, measured)
            if tools:
                task = progress.add_task("tool calls", total=len(REQUESTS))
                report = check_tools(endpoint, lambda done: progress.update(task, completed=done))
                wrong = report.faults + report.refused
                detail = f"{report.calls} calls in {report.requests} answers, {len(wrong)} faults"
                verdict.checks.append(Check("tool calls", not wrong, "; ".join([detail, *wrong])))
            if conformance:
                task = progress.add_task("conformance", total=len(CASES))
                for outcome in check_conformance(endpoint, lambda done: progress.update(task, completed=done)):
                    if outcome.verdict in (PASS, FAIL):
                        verdict.checks.append(Check(outcome.name, outcome.verdict == PASS, outcome.detail))
                    else:
                        measured.not_shown.append(f"{outcome.name}: {outcome.detail}")
            if needle:
                task = progress.add_task("needles", total=len(LENGTHS) * len(DEPTHS))
                needles = find_needles(endpoint, lambda done: progress.update(task, completed=done))
                asked = [found for found in needles if not found.note]
                lost = [f"{found.tokens:,} tokens at {found.depth:.0%}" for found in asked if not found.right]
                detail = f"{len(asked) - len(lost)} of {len(asked)} found"
                verdict.checks.append(Check("needles", not lost, "; lost in ".join([detail, *lost])))
                notes = dict.fromkeys(f"a needle in {f.tokens:,} tokens: {f.note}" for f in needles if f.note)
                measured.not_shown += notes
    except (GoldenError, EndpointError, OSError) as error:
        fail(error, NOT_ASKED)
    click.echo(as_text(measured, verdict))
    write(json_out, lambda: json.dumps(as_json(expected, measured, verdict), indent=1) + "\n")
    write(html_out, lambda: as_html(expected, measured, verdict))
    if not verdict.passed:
        raise click.exceptions.Exit(NOT_RIGHT)


@click.command(cls=Command)
@click.argument("urls", cls=Argument, nargs=-1, required=True, metavar="URL URL...", about="Two servers or more.")
@click.option("--prompts", type=PATH, required=True, help="A file of prompts, as `k26 golden` takes it.")
@click.option("--answer-tokens", type=click.IntRange(min=1), default=8, help="Tokens of each greedy answer.")
@api_key_option
@json_option
@html_option
def compare(
    urls: tuple[str, ...],
    prompts: Path,
    answer_tokens: int,
    api_key: str | None,
    json_out: Path | None,
    html_out: Path | None,
) -> None:
    """Compare running servers with each other, every pair of them, if there is no golden file.

    Compares how messages become tokens, the distributions over prompts if both servers report them, and greedy answers.
    Two servers that agree can both be wrong. A prompt of raw text is compared only between servers that report prompts
    (vLLM, SGLang), since a vendor's chat API does not take one.

    Exits with 0 if all pairs agree, with 1 if a pair does not, and with 2 if a server could not be asked.
    """
    from k26_plugins.operate.golden import PromptError, read_requests
    from k26_plugins.operate.verify import compare as comparison
    from k26_plugins.operate.verify.compare_report import as_html, as_json, as_text
    from k26_plugins.operate.verify.connect import connect
    from k26_plugins.operate.verify.endpoint import EndpointError

    if len(urls) < 2:
        fail("one server: give two or more.", NOT_ASKED)
    require_plots(html_out, NOT_ASKED)
    require_writable(json_out, html_out, code=NOT_ASKED)
    try:
        asked = read_requests(prompts)
        endpoints = [connect(url, None, api_key) for url in urls]
        with progress_bar() as progress:
            task = progress.add_task("prompts", total=len(asked))
            pairs = comparison.compare(
                endpoints, asked, lambda done: progress.update(task, completed=done), answer_tokens=answer_tokens
            )
    except (EndpointError, PromptError) as error:
        fail(error, NOT_ASKED)
    click.echo(as_text(pairs, endpoints))
    write(json_out, lambda: json.dumps(as_json(pairs, endpoints), indent=1) + "\n")
    write(html_out, lambda: as_html(pairs, endpoints))
    if not all(pair.agree for pair in pairs):
        raise click.exceptions.Exit(NOT_RIGHT)
