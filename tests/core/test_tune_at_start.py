"""Tests of `K26_TUNE=start`: one process measures, and if anything goes wrong there, the server starts with the
engine's own experts."""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from k26_plugins.common.experts import tune_at_start
from k26_plugins.common.experts.outcome import OURS, Key, Outcome, Timing, outcome_file, write_outcome
from k26_plugins.common.experts.tune_at_start import measure, visible_alone
from k26_plugins.common.purpose import Purpose
from k26_plugins.common.settings import check_settings
from k26_plugins.operate.tune.routing import Layer

KEY = Key("NVIDIA H200", "570", "3.6", "2.11", "vllm 0.32.0", "7168x256x384")
CPU = torch.device("cpu")

# This program stands in for the one that needs a GPU: it notes that it ran, takes its time, and leaves an outcome.
WRITER = """
import os, shutil, sys, time
with open(os.environ["RAN"], "a") as file:
    print(os.environ.get("K26_TUNE"), *sys.argv[1:], file=file)
time.sleep(float(os.environ.get("SLOW", "0")))
shutil.copy(os.environ["MADE"], os.environ["KEPT"])
"""


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file that gets a line for each run of the program that stands in for the measurement."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("K26_TUNE", "start")
    monkeypatch.setattr(tune_at_start, "COMMAND", (sys.executable, "-c", WRITER))
    timings = (Timing(OURS, "uniform", 1, 0.5, 1e-3), Timing("marlin", "uniform", 1, 1.0, 1e-3))
    write_outcome(Outcome(KEY, Purpose.BOTH, {}, timings), tmp_path / "made.json")
    for name, file in {"RAN": tmp_path / "ran", "MADE": tmp_path / "made.json", "KEPT": outcome_file(KEY)}.items():
        monkeypatch.setenv(name, str(file))
    return tmp_path / "ran"


def test_of_several_that_start_at_once_one_measures(ran: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOW", "1")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: measure(KEY, "vllm", CPU), range(4)))
    assert found == [None] * 4
    assert ran.read_text() == "None 7168x256x384 vllm\n"
    assert json.loads(outcome_file(KEY).read_text())["key"]["gpu"] == "NVIDIA H200"


@pytest.mark.usefixtures("ran")
def test_the_real_measurement_says_that_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU, which would be measured")
    monkeypatch.setattr(tune_at_start, "COMMAND", (sys.executable, "-m", "k26_plugins.operate.tune"))
    assert measure(KEY, "vllm", CPU) == "`k26 tune` needs the GPU that it measures, and torch finds none"


@pytest.mark.usefixtures("ran")
def test_one_that_ends_badly_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_at_start, "COMMAND", (sys.executable, "-c", "raise MemoryError('full')"))
    assert measure(KEY, "vllm", CPU) == "MemoryError: full"
    monkeypatch.setattr(tune_at_start, "COMMAND", (sys.executable, "-c", "pass"))
    assert measure(KEY, "vllm", CPU) == "it ended with 0"
    monkeypatch.setattr(tune_at_start, "COMMAND", (sys.executable, "-c", "import time; time.sleep(60)"))
    monkeypatch.setattr(tune_at_start, "LIMIT", 1.0)
    began = time.monotonic()
    assert measure(KEY, "vllm", CPU) == "it did not end within 1 s"
    assert time.monotonic() - began < 30


@pytest.mark.usefixtures("ran")
def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert measure(KEY, "vllm", CPU) == f"{tmp_path / 'file/k26-plugins/tuned'} cannot be written (Not a directory)"


def test_it_sees_the_gpu_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    variable = "HIP_VISIBLE_DEVICES" if torch.version.hip else "CUDA_VISIBLE_DEVICES"
    assert visible_alone(CPU) == {}
    monkeypatch.delenv(variable, raising=False)
    assert visible_alone(torch.device("cuda", 3)) == {variable: "3"}
    monkeypatch.setenv(variable, "4,GPU-8932f937")
    assert visible_alone(torch.device("cuda", 1)) == {variable: "GPU-8932f937"}


def test_any_other_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K26_TUNE", "always")
    with pytest.raises(ValueError, match="K26_TUNE is 'always': choose start, or unset it"):
        check_settings()


def test_sizes_as_an_outcome_names_them() -> None:
    layer = Layer.of_shape("7168x2048x48")
    assert replace(layer, name="ep8") == Layer("ep8", 7168, 2048, 48, 384, 8)
    assert layer.shape == "7168x2048x48"
    with pytest.raises(ValueError, match="'7168x2048' names no sizes"):
        Layer.of_shape("7168x2048")
