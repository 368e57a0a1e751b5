"""Other ways to run the server: several ranks, redundant experts, another backend, another model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support import documented
from support.absent import plugin_that_rank_1_lacks
from support.agreement import assert_same_top
from support.checkpoints import make_llama
from support.server import Server, StartError
from support.sglang_server import EAGER, TWO_RANKS, first_tokens, serve
from support.swarm import (
    assert_a_killed_worker_is_said,
    assert_a_swarm_is_held,
    assert_the_metrics_are_there,
)

# SGLang reads a field of the body before it has looked whether that is an object.
KNOWN = frozenset({"bad JSON: a list"})
REDUNDANT_EXPERTS = ["--enable-eplb", "--ep-num-redundant-experts", "4"]


@pytest.fixture(scope="module")
def one_rank(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tiny_folder, tmp_path_factory.mktemp("one") / "log", "--enable-metrics", **EAGER) as server:
        yield server


def test_a_swarm_is_held_among_hostile_requests(one_rank: Server, tiny_folder: Path, tmp_path: Path) -> None:
    assert_a_swarm_is_held(one_rank, tiny_folder, tmp_path / "run.json", agents=16, steps=40, hostile=63, known=KNOWN)
    assert_the_metrics_are_there(one_rank, ranks=1, layers=2)


@pytest.mark.parametrize(
    "arguments",
    [
        [],  # the documented command, tensor parallel
        # Redundant experts in place. Moving them later ends in SGLang's own wait for a CUDA device.
        ["--tp-size", "2", "--ep-size", "2", "--mm-enable-dp-encoder", *REDUNDANT_EXPERTS],
        ["--pp-size", "2"],
    ],
    ids=["tensor", "expert", "pipeline"],
)
def test_two_ranks_answer_as_one(tiny_folder: Path, tmp_path: Path, one_rank: Server, arguments: list[str]) -> None:
    command = documented.as_run(documented.SGLANG, tiny_folder) if not arguments else ()
    with serve(tiny_folder, tmp_path / "log", *arguments, command=command, **TWO_RANKS, **EAGER) as server:
        assert_same_top(first_tokens(server), first_tokens(one_rank))
        if not arguments:
            assert_a_killed_worker_is_said(server, "scheduler_TP1")


def test_a_rank_without_the_plugin_stops_the_start(tiny_folder: Path, tmp_path: Path) -> None:
    settings = plugin_that_rank_1_lacks(tmp_path / "plugin", "sglang", "sglang.srt.plugins")
    with (
        pytest.raises(StartError, match="k26-plugins is not active on rank 1 of 2"),
        serve(tiny_folder, tmp_path / "log", "--tp-size", "2", **settings, **TWO_RANKS, **EAGER),
    ):
        pass


def test_the_reference_backend_by_hand(tiny_folder: Path, tmp_path: Path, one_rank: Server) -> None:
    with serve(tiny_folder, tmp_path / "log", K26_EXPERTS="reference", **EAGER) as server:
        assert "run on the core (reference)" in server.log.read_text()
        assert_same_top(first_tokens(server), first_tokens(one_rank))


def test_another_architecture_is_served_as_without_the_plugin(tmp_path: Path) -> None:
    """A small Llama with and without the plugin: the same tokens, and no word of ours in the log."""
    folder = tmp_path / "llama"
    make_llama(folder)
    answers = []
    for plugins in ("k26", "none"):
        with serve(folder, tmp_path / f"log-{plugins}", "--skip-tokenizer-init", SGLANG_PLUGINS=plugins) as server:
            answer = server.post(
                "/generate",
                input_ids=list(range(50)),
                sampling_params={"max_new_tokens": 8, "temperature": 0, "ignore_eos": True},
            )
            answers.append(answer.json()["output_ids"])
            assert "k26-plugins:" not in server.log.read_text()
    assert len(answers[0]) == 8
    assert answers[0] == answers[1]
