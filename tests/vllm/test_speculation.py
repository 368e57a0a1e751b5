"""Tests of speculative decoding in the real server: the model's answers do not depend on the guesses.

The judge is a server of the same checkpoint without speculation.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import documented
from support.agreement import BYTES, VOCABULARY, rows
from support.grammar import CHOICES, REGEX, SCHEMA, is_valid
from support.guesses import Greedy, Steps, assert_no_farther, assert_parts_no_more
from support.hidden_states import LAYERS_READ, assert_read_in_front_of, make_with_draft
from support.images import image_part, png, random_image
from support.scripted import CASES, parsed, streamed
from support.served_grammar import TOOL
from support.server import Server, python_path
from support.swarm import metric
from support.vllm_hidden import read_by_draft
from support.vllm_server import serve

from k26_plugins.common.checkpoint import Checkpoint
from k26_plugins.common.prompt.output import THINK_END
from k26_plugins.common.prompt.tokenizer import KimiTokenizer
from k26_plugins.common.reference.kimi_k26 import KimiK26

pytestmark = pytest.mark.long
# An n-gram's guesses are what followed the same tokens before. The prompts repeat themselves, so that there is much to
# guess.
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
PROMPTS = [[random.Random(seed).randrange(256) for _ in range(20)] * 4 for seed in range(6)]
# JSON may contain any amount of white space, and a model with random weights would write hardly anything else.
SHORT_JSON = ["--structured-outputs-config", json.dumps({"backend": "xgrammar", "disable_any_whitespace": True})]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_with_draft(tmp_path_factory.mktemp("speculation"))


@pytest.fixture(scope="module")
def judge(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yield a server of the same checkpoint without speculation."""
    log = tmp_path_factory.mktemp("judge") / "server.log"
    with serve(folders[0], log, "--enforce-eager", *SHORT_JSON) as running:
        yield running


@dataclass
class Guessing:
    method: str
    server: Server


@pytest.fixture(scope="module", params=["ngram", "eagle3"])
def guessing(
    request: pytest.FixtureRequest, folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Guessing]:
    folder, draft = folders
    command = [*documented.as_run(documented.PLAIN_VLLM, folder), "--speculative-config", json.dumps(NGRAM)]
    if request.param == "eagle3":
        command = [word.replace("DRAFT", str(draft)) for word in documented.as_run(documented.EAGLE3_VLLM, folder)]
    arguments = ["--enforce-eager", *SHORT_JSON, "--worker-extension-cls", "support.vllm_hidden.Worker"]
    settings = {"PYTHONPATH": python_path(), "VLLM_SERVER_DEV_MODE": "1"}
    log = tmp_path_factory.mktemp(request.param) / "server.log"
    with serve(folder, log, *arguments, command=command, **settings) as running:
        yield Guessing(request.param, running)


@pytest.fixture(scope="module")
def special(folders: tuple[Path, Path]) -> dict[str, int]:
    return dict(KimiTokenizer(folders[0]).special)


def counted(server: Server, what: str) -> float:
    return sum(metric(server, f"vllm:spec_decode_num_{what}_tokens_total").values())


def greedy(server: Server, judge: Server) -> Greedy:
    """Return the answers to PROMPTS, each asked alone, with the judge's log-probabilities for the same tokens."""
    token_ids, served, expected = [], [], []
    for prompt in PROMPTS:
        answer = server.complete(
            prompt, max_tokens=60, temperature=0, logprobs=VOCABULARY, allowed_token_ids=BYTES,
            return_tokens_as_token_ids=True,
        )  # fmt: skip
        logprobs = answer["choices"][0]["logprobs"]
        answered = [int(token.removeprefix("token_id:")) for token in logprobs["tokens"]]
        assert len(answered) == 60
        token_ids += answered
        served.append(rows(logprobs["top_logprobs"]))
        read = judge.complete([*prompt, *answered], max_tokens=1, prompt_logprobs=VOCABULARY)
        expected.append(rows(read["choices"][0]["prompt_logprobs"][len(prompt) :]))
    return Greedy(torch.tensor(token_ids), torch.cat(served), torch.cat(expected))


@pytest.fixture(scope="module")
def own(judge: Server) -> Greedy:
    return greedy(judge, judge)


def test_answers_with_guesses_are_the_models(guessing: Guessing, judge: Server, own: Greedy) -> None:
    accepted, guessed = counted(guessing.server, "accepted"), counted(guessing.server, "draft")
    found = greedy(guessing.server, judge)
    accepted, guessed = counted(guessing.server, "accepted") - accepted, counted(guessing.server, "draft") - guessed
    print(f"{guessing.method}: {accepted:.0f} of {guessed:.0f} guesses taken")
    # Guesses must have been accepted, and others rejected.
    assert 10 < accepted < guessed - 10
    assert_no_farther(found, own, BYTES)
    # The comparison must notice if one guess in ten were accepted unseen, which is as if the second-likeliest token
    # were in the place of the likeliest.
    second = found.expected[:, BYTES].topk(2).indices[::10, 1]
    token_ids = found.token_ids.clone()
    token_ids[::10] = second
    with pytest.raises(AssertionError):
        assert_no_farther(replace(found, token_ids=token_ids), own, BYTES)


def test_the_draft_reads_the_layers_that_it_asks_for(
    guessing: Guessing, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    if guessing.method != "eagle3":
        pytest.skip("n-grams read nothing of the model")
    assert f"Using auxiliary layers from speculative config: {LAYERS_READ}" in guessing.server.log.read_text()
    token_ids = [random.Random(9).randrange(256) for _ in range(100)]
    read = read_by_draft(guessing.server, token_ids, tmp_path / "read.safetensors")
    assert_read_in_front_of(LAYERS_READ, read, KimiK26(Checkpoint(folders[0]), torch.float32), token_ids)


JSON = {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}}
QUESTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    **{
        f"image {seed}": ([image_part(png(random_image(100 + 40 * seed, 80, seed))), {"type": "text", "text": "What?"}], {})
        for seed in range(4)
    },
    **{f"thinking {word}": (word * 9, {"chat_template_kwargs": {"thinking": True}}) for word in ("Why? ", "How? ")},
    **{f"JSON {word}": (word * 9, JSON) for word in ("Where? ", "When? ")},
    **{f"regex {word}": (word * 9, {"structured_outputs": {"regex": REGEX}}) for word in ("Who? ", "Which? ")},
    **{f"call {word}": (word * 9, {"tools": [TOOL], "tool_choice": "required"}) for word in ("Go. ", "Run. ")},
}  # fmt: skip


def asked(server: Server, name: str) -> Steps:
    content, fields = QUESTIONS[name]
    answer = server.chat(
        content, max_tokens=40, temperature=0, logprobs=True, top_logprobs=VOCABULARY, return_tokens_as_token_ids=True,
        **{"chat_template_kwargs": {"thinking": False}, **fields},
    )  # fmt: skip
    choice = answer["choices"][0]
    entries = choice["logprobs"]["content"]
    logprobs = [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in entries]
    return Steps(json.dumps(choice["message"]), [entry["token"] for entry in entries], logprobs)


@pytest.fixture(scope="module")
def alone(judge: Server) -> dict[str, Steps]:
    return {name: asked(judge, name) for name in QUESTIONS}


@pytest.fixture(scope="module")
def together(judge: Server) -> dict[str, Steps]:
    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        return dict(zip(QUESTIONS, pool.map(lambda name: asked(judge, name), QUESTIONS), strict=True))


def unseen(steps: Steps) -> Steps:
    """Return the answer's first five tokens as if a guess had been accepted unseen: the fifth is the
    second-likeliest."""
    second = sorted(steps.logprobs[4], key=steps.logprobs[4].__getitem__)[-2]
    return replace(steps, tokens=[*steps.tokens[:4], second])


def test_images_thinking_grammars_and_calls_are_answered_as_without(
    guessing: Guessing, alone: dict[str, Steps], together: dict[str, Steps]
) -> None:
    assert_parts_no_more({name: asked(guessing.server, name) for name in QUESTIONS}, alone, together, unseen)


# The bytes that valid answers of each kind contain. If the allowed tokens and the grammar had none in common, vLLM
# would answer with an error.
DRAWN = {
    "json": (string.ascii_lowercase + string.digits + '{}[]":,-').encode(),
    "choice": "".join(CHOICES).encode(),
    "regex": (string.ascii_lowercase + string.digits + "é").encode(),
}
# Numbers are chosen from a list, because a model with random weights would go on with digits for ever.
DAYS = {"type": "array", "items": {"enum": [1, 2, 30]}, "minItems": 1, "maxItems": 3}
PLAIN_SCHEMA = {**SCHEMA, "properties": {**SCHEMA["properties"], "days": DAYS, "wet": {"enum": ["yes", "no"]}}}
HELD_TO: dict[str, Any] = {"json": PLAIN_SCHEMA, "choice": CHOICES, "regex": REGEX}


@pytest.mark.parametrize("thinking", [False, True])
def test_answers_drawn_at_random_are_valid_and_the_reasoning_is_free(
    guessing: Guessing, special: dict[str, int], thinking: bool
) -> None:
    """Where answers are drawn, chance decides which guesses are accepted. Few tokens are allowed, so that the thinking
    ends soon; `logit_bias` cannot be used for that, because vLLM does not take it with speculative decoding."""
    ends = [special["<|im_end|>"], *([special[THINK_END]] if thinking else [])]

    def ask(kind: str, seed: int) -> dict[str, Any]:
        answer = guessing.server.chat(
            "Where? " * 9, max_tokens=200, temperature=1, seed=seed, allowed_token_ids=[*DRAWN[kind], *ends],
            structured_outputs={kind: HELD_TO[kind]}, chat_template_kwargs={"thinking": thinking}, return_token_ids=True,
        )  # fmt: skip
        choice: dict[str, Any] = answer["choices"][0]
        return choice

    before = counted(guessing.server, "draft")
    asked = [(kind, seed) for kind in HELD_TO for seed in range(6)]
    with ThreadPoolExecutor(len(asked)) as pool:
        choices = list(pool.map(lambda one: ask(*one), asked))
    assert counted(guessing.server, "draft") > before
    answered, free = 0, 0
    for (kind, _), choice in zip(asked, choices, strict=True):
        thought = choice["message"]["reasoning"] or ""
        free += bool(thought) and not is_valid(kind, thought)
        # Some answers never stop thinking, and some end within their thinking.
        if not thinking or (special[THINK_END] in choice["token_ids"] and choice["finish_reason"] == "stop"):
            answered += 1
            assert is_valid(kind, choice["message"]["content"] or ""), choice
    print(f"{guessing.method}: {answered} answers, {free} thoughts that are none, of {len(asked)}")
    assert answered >= 3
    assert (free > 0) == thinking


# Requests with only one possible answer, because near a tie the likeliest of several would depend on when guesses came.
ROUTE, PLACE = "Take the second road on the left, then the first on the right.", "Zürich am See"
PLACES = {
    "type": "object",
    "properties": {"city": {"enum": [PLACE]}},
    "required": ["city"],
    "additionalProperties": False,
}
GO = {"type": "function", "function": {"name": "go", "parameters": PLACES, "strict": True}}
# Without "<" the model cannot spell a call's marker as text in the place of the control token.
NOT_SPELLED = [token for token in range(VOCABULARY) if token != ord("<")]
FORCED: dict[str, dict[str, Any]] = {
    "an answer": {
        "structured_outputs": {"choice": [ROUTE]}, "tool_choice": "none", "chat_template_kwargs": {"thinking": False},
    },
    "thinking": {"allowed_token_ids": [ord("x")], "max_tokens": 40, "chat_template_kwargs": {"thinking": True}},
    "a call": {
        "tools": [GO], "tool_choice": "required", "parallel_tool_calls": False, "allowed_token_ids": NOT_SPELLED,
        "chat_template_kwargs": {"thinking": False},
    },
}  # fmt: skip


@pytest.mark.parametrize("what", FORCED)
def test_what_is_streamed_is_what_comes_whole(guessing: Guessing, what: str) -> None:
    """An answer is the same streamed as whole, although with guesses several tokens come in one streaming chunk."""
    whole, piecewise = (ask(guessing.server, CASES["call"], FORCED[what]) for ask in (parsed, streamed))
    for reasoning, content, calls, *_ in (whole, piecewise):
        assert reasoning == ("x" * 40 if what == "thinking" else "")
        assert content == (ROUTE if what == "an answer" else "")
        made = [(name, json.loads(arguments)["city"]) for name, arguments in calls]
        assert made == ([("go", PLACE)] if what == "a call" else [])
