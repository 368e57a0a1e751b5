"""Tests of other ways to run the server: several ranks, redundant experts, another backend, another model."""

from __future__ import annotations

import shutil
from itertools import cycle
from pathlib import Path

import pytest
from click.testing import CliRunner
from support import documented
from support.absent import plugin_that_rank_1_lacks
from support.agreement import assert_same_top
from support.checkpoints import LLAMA_PROMPT, make_llama
from support.server import Server, start_fails
from support.sglang_server import EAGER, TWO_RANKS, first_tokens, serve
from support.sglang_updates import WAYS
from support.swarm import (
    assert_a_killed_worker_is_said,
    assert_a_swarm_is_held,
    assert_the_metrics_are_there,
)

from k26_plugins.cli import app

# A known fault: SGLang reads a field of a request's body before it checks whether the body is an object.
KNOWN = frozenset({"bad JSON: a list"})
REDUNDANT_EXPERTS = ["--enable-eplb", "--ep-num-redundant-experts", "4"]


@pytest.fixture(scope="module")
def one_rank(scripted_server: Server) -> Server:
    return scripted_server


def test_a_swarm_is_held_among_adversarial_requests(one_rank: Server, tiny_folder: Path, tmp_path: Path) -> None:
    assert_a_swarm_is_held(
        one_rank, tiny_folder, tmp_path / "run.json", agents=16, steps=40, adversarial=63, known=KNOWN
    )
    assert_the_metrics_are_there(one_rank, ranks=1, layers=2)


DEPLOYMENTS: dict[str, tuple[list[str], dict[str, str]]] = {
    "tensor": ([], {}),  # the documented command
    # Redundant experts stay where the start puts them: moving them later ends in SGLang's own wait for a CUDA device.
    "expert": (["--tp-size", "2", "--ep-size", "2", "--mm-enable-dp-encoder", *REDUNDANT_EXPERTS], {}),
    "pipeline": (["--pp-size", "2"], {"K26_EXPERTS": "reference"}),
    "data": (["--tp-size", "2", "--dp-size", "2", "--enable-dp-attention"], {}),
}
IN_CI = ("tensor", "expert", "pipeline")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in IN_CI else pytest.mark.long) for name in DEPLOYMENTS]
)
def test_two_ranks_answer_as_one(tiny_folder: Path, tmp_path: Path, one_rank: Server, name: str) -> None:
    arguments, settings = DEPLOYMENTS[name]
    command = () if arguments else documented.as_run(documented.SGLANG, tiny_folder)
    environment = {**TWO_RANKS, **EAGER, **settings}
    with serve(tiny_folder, tmp_path / "log", *arguments, command=command, **environment) as server:
        assert ("run on the core (reference)" in server.log.read_text()) == ("K26_EXPERTS" in settings)
        assert_same_top(first_tokens(server), first_tokens(one_rank))
        if name == "tensor":
            assert_a_killed_worker_is_said(server, "scheduler_TP1")


def test_a_rank_without_the_plugin_stops_the_start(tiny_folder: Path, tmp_path: Path) -> None:
    settings = plugin_that_rank_1_lacks(tmp_path / "plugin", "sglang", "sglang.srt.plugins")
    with (
        start_fails("k26-plugins is not active on rank 1 of 2"),
        serve(tiny_folder, tmp_path / "log", "--tp-size", "2", **settings, **TWO_RANKS, **EAGER),
    ):
        pass


@pytest.mark.long
def test_weights_that_a_trainer_sends_later(
    tiny_folder: Path, golden_file: Path, updated: tuple[Path, Path], tmp_path: Path
) -> None:
    """A server that starts with dummy weights answers, and after each update of its weights it answers as a server that
    was started with the new ones."""
    shutil.copytree(tiny_folder, tmp_path / "small", ignore=shutil.ignore_patterns("*.safetensors"))
    with serve(tmp_path / "small", tmp_path / "log", "--load-format", "dummy", **EAGER) as server:
        sampling = {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True}
        answer = server.post("/generate", input_ids=[1, 2, 3], sampling_params=sampling)
        assert len(answer.json()["output_ids"]) == 4
        for update, (folder, golden) in zip(WAYS, cycle((updated, (tiny_folder, golden_file))), strict=False):
            update(server, folder)
            result = CliRunner().invoke(app, ["verify", "--url", server.url, "--golden", str(golden)])
            assert result.exit_code == 0, result.output


def test_another_architecture_is_left_to_sglang(tmp_path: Path) -> None:
    """A small Llama is answered with transformers' tokens, and the plugin writes nothing to the log."""
    expected = make_llama(tmp_path / "llama")
    arguments = ["--skip-tokenizer-init", "--dtype", "float32"]
    with serve(tmp_path / "llama", tmp_path / "log", *arguments, **EAGER) as server:
        sampling = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
        answer = server.post("/generate", input_ids=LLAMA_PROMPT, sampling_params=sampling)
        assert answer.json()["output_ids"] == expected
        assert "k26-plugins:" not in server.log.read_text()
