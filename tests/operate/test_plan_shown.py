"""Tests of a machine's layouts side by side, and of the drawing of what its GPUs hold."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from k26_plugins.cli import app
from k26_plugins.common.experts.outcome import OURS, Key, Outcome, Timing, outcome_file, write_outcome
from k26_plugins.common.purpose import Purpose
from k26_plugins.operate.plan.hardware import parse


def test_engines_and_layouts_side_by_side() -> None:
    """The table agrees with the KV caches that were published for this machine, and with the plan of each engine
    alone."""
    options = ["--gpus", "8xRTXPRO6000", "--kv-dtype", "fp8", "--gpu-memory-utilization", "0.94", "--ram", "700"]
    rows = json.loads(CliRunner().invoke(app, ["plan", *options, "--compare", "--json"]).stdout)
    cut = {
        row["context_parallel"]: row["kv_tokens"]
        for row in rows
        if row["engine"] == "vllm" and row["tensor_parallel"] == 8
    }
    published = {1: 437_264, 4: 1_686_656, 8: 3_267_968}
    assert {ranks: cut[ranks] for ranks in published} == pytest.approx(published, rel=0.1)
    for engine in ("vllm", "sglang", "ktransformers"):
        alone = json.loads(CliRunner().invoke(app, ["plan", *options, "--engine", engine, "--json"]).stdout)
        same = [row for row in rows if row["engine"] == engine and row["fits"]]
        names = ("tensor_parallel", "pipeline_parallel", "context_parallel", "kv_tokens", "fits")
        assert tuple(same[0][name] for name in names) == tuple(alone[name] for name in names)
    table = CliRunner().invoke(app, ["plan", *options, "--compare"])
    assert table.exit_code == 0
    columns = {re.search(r" (yes|no) ", line) for line in table.stdout.splitlines()[1:]}
    assert len({match and match.start() for match in columns}) == 1
    none = CliRunner().invoke(app, ["plan", "--gpus", "1xL4", "--ram", "64", "--compare"])
    assert none.exit_code == 1
    assert "yes" not in none.stdout


def test_which_experts_are_taken_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's own experts are taken, unless this machine has a measurement of such a GPU, the engine and a rank's
    sizes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = ["plan", "--gpus", "8xH200", "--engine", "sglang"]
    unknown = "INT4 experts: sglang's own, until `k26 tune --tp 8 --engine sglang` on such a GPU"
    assert unknown in CliRunner().invoke(app, command).stdout
    timings = tuple(Timing(name, "uniform", 1, ms, 1e-3) for name, ms in ((OURS, 0.5), ("marlin", 1.0)))
    for gpu, shape in (("NVIDIA H200 NVL", "7168x256x384"), ("NVIDIA H200", "7168x2048x48")):
        key = Key(gpu, "570", "3.6", "2.11", "sglang 0.5.23", shape)
        write_outcome(Outcome(key, Purpose.DECODE, {}, timings), outcome_file(key))
    assert unknown in CliRunner().invoke(app, command).stdout
    key = Key("NVIDIA H200", "570", "3.6", "2.11", "sglang 0.5.23", "7168x256x384")
    write_outcome(Outcome(key, Purpose.DECODE, {}, timings), outcome_file(key))
    said = "INT4 experts: the core's, for decode k26 takes 0.50 of the time of marlin"
    assert said in CliRunner().invoke(app, command).stdout
    assert "INT4 experts: vllm's own" in CliRunner().invoke(app, ["plan", "--gpus", "8xH200"]).stdout


@pytest.mark.parametrize("gpus", ["8xH200", "16xH100", "4xH100"])
def test_the_memory_that_is_drawn(gpus: str) -> None:
    """Each pipeline stage has a bar of 60 marks for a GPU's memory, with marks beyond the bar if the stage does not
    fit."""
    result = CliRunner().invoke(app, ["plan", "--gpus", gpus])
    drawn = re.findall(r"GPUs? \d+ ?(?:to \d+)? *\|([EWaK.]*)\|([EWaK]*)", result.stdout)
    stages_of = json.loads(CliRunner().invoke(app, ["plan", "--gpus", gpus, "--json"]).stdout)["memory_by_gpu"]
    assert len(drawn) == len(stages_of) == (2 if gpus == "16xH100" else 1)
    memory = parse(gpus)[1].memory
    for (bar, beyond), stage in zip(drawn, stages_of, strict=True):
        assert len(bar) == 60
        assert bool(beyond) == (gpus == "4xH100") == (stage["bytes"]["free"] < 0)
        assert sum(stage["bytes"].values()) == memory
        assert (bar + beyond).count("E") == pytest.approx(60 * stage["bytes"]["experts"] / memory, abs=1)
    assert [gpu for stage in stages_of for gpu in range(stage["gpus"][0], stage["gpus"][1] + 1)] == list(
        range(int(gpus.split("x")[0]))
    )
