"""Tests of the doctor in environments that are right and wrong, and of what `k26 serve` starts."""

from __future__ import annotations

import re
import shlex
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from support.checkpoints import DAMAGES
from support.doctor import doctor

from k26_plugins.cli import app
from k26_plugins.common.experts.native.build import BuildError
from k26_plugins.common.host.cores import Core, cores
from k26_plugins.operate.doctor import Level, bandwidth, engines, experts, machine
from k26_plugins.operate.doctor.pieces import piece_findings


@pytest.fixture
def fake_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that puts an engine in vLLM's place, whose probe is the program that it is given."""

    def answer(text: str) -> None:
        (tmp_path / "probe.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setattr(engines, "PROBES", {"vllm": "probe"})
        monkeypatch.setattr(engines, "is_installed", lambda engine: True)

    return answer


def state(**changes: Any) -> str:
    content = {
        "package": "vllm",
        "version": "0.32.0",
        "checked": "0.19.1 to 0.32.0",
        "active": True,
        "why_not": "",
        "fix": "",
        **changes,
    }
    return f"import json; print('noise'); print(json.dumps({content!r}))"


def test_an_environment_that_is_right(tiny_folder: Path, fake_engine: Any) -> None:
    fake_engine(state())
    found = doctor("--checkpoint", str(tiny_folder), "--engine", "vllm")
    assert found["vllm"]["detail"] == "vllm 0.32.0: the plugin is active"
    # A server takes the native backend if there is a compiler, and else the next.
    assert found["experts"]["detail"] in ("a server on cpu takes: native", "a server on cpu takes: cpu")
    assert "222 tensors" in found["checkpoint"]["detail"]
    assert found["experts: cpu"]["level"] == "ok"
    assert "this CPU has " in found["experts: instruction sets"]["detail"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("sse2 avx2 fma", "this CPU has AVX2; "),
        ("avx2 avx_vnni avx512f avx512_vnni amx_bf16", "AVX2, AVX-VNNI, AVX512, AVX512-VNNI, AMX; "),
        ("asimd asimddp i8mm sve", "this CPU has ARM's dot product, i8mm, SVE; "),
        ("", "none that is known; "),
    ],
)
def test_what_the_cpu_has_for_the_experts(flags: str, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "cpu_flags", lambda: frozenset(flags.split()))
    assert named in experts.instruction_set().detail

    def none() -> None:
        raise BuildError("no C++ compiler is found")

    monkeypatch.setattr(experts, "process_threads", none)
    assert experts.instruction_set().detail.endswith("; native takes none")


def test_what_is_the_engines_by_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K26_MEDIA", "engine")
    monkeypatch.setenv("K26_PARSERS", "none")
    (found,) = piece_findings()
    assert found.detail == (
        "experts auto (K26_EXPERTS), prompts ours (K26_PROMPTS), images and videos the engine's (K26_MEDIA), "
        "parsers none by default (K26_PARSERS)"
    )
    monkeypatch.setenv("K26_PROMPTS", "mine")
    (found,) = piece_findings()
    assert found.level is Level.BAD
    assert found.detail == "K26_PROMPTS is 'mine': choose auto or engine, or unset it."


@pytest.mark.parametrize(
    ("probe", "level", "detail"),
    [
        (state(active=False, why_not="VLLM_PLUGINS is set"), "BAD", "NOT active: VLLM_PLUGINS is set"),
        (state(version="0.40.1"), "note", "none of the versions checked, 0.19.1 to 0.32.0"),
        ("raise ImportError('libcuda.so.1')", "BAD", "cannot be asked: ImportError: libcuda.so.1"),
        ("import sys; sys.exit(0)", "BAD", "cannot be asked"),
    ],
)
def test_an_engine_that_is_not_as_it_should(
    tiny_folder: Path, fake_engine: Any, probe: str, level: str, detail: str
) -> None:
    fake_engine(probe)
    found = doctor("--checkpoint", str(tiny_folder), code=1 if level == "BAD" else 0)["vllm"]
    assert found["level"] == level
    assert detail in found["detail"]


def test_what_kt_run_would_start(tiny_folder: Path, fake_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """KTransformers' SGLang has no entry point, so it starts with the plugin only if the environment's path has it."""
    line = "export PYTHONPATH=HERE"
    monkeypatch.setattr(engines, "installed", lambda package: "0.7.2")
    for active in (True, False):
        fake_engine(state(package="sglang-kt", version="0.7.2", checked="0.7.2 to 0.7.2", active=active, fix=line))
        monkeypatch.setattr(engines, "PROBES", {"sglang": "probe"})
        found = doctor("--checkpoint", str(tiny_folder), code=0 if active else 1)
        assert found["sglang"]["detail"].startswith("sglang-kt 0.7.2: the plugin is ")
        word = "with" if active else "WITHOUT"
        assert found["ktransformers"]["detail"].endswith(f"`kt run` starts sglang-kt 0.7.2 {word} the plugin")
    assert found["sglang"]["fix"] == line


def test_an_engine_that_is_asked_for_and_missing(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "is_installed", lambda engine: False)
    found = doctor("--checkpoint", str(tiny_folder), "--engine", "sglang", code=1)
    assert found["sglang"]["detail"] == "not installed here"


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    shutil.copytree(tiny_folder, tmp_path / "copy")
    damage(tmp_path / "copy")
    found = doctor("--checkpoint", str(tmp_path / "copy"), code=1)
    assert message in found["checkpoint"]["detail"]


def test_a_tokenizer_that_the_download_missed(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "copy")
    (tmp_path / "copy" / "tiktoken.model").unlink()
    assert "tiktoken.model" in doctor("--checkpoint", str(tmp_path / "copy"), code=1)["tokenizer"]["detail"]


@pytest.mark.parametrize(("number", "broken"), [("5.3.9", False), ("5.4.0", True), ("5.5.3", True), ("5.5.4", False)])
def test_transformers_that_shift_special_tokens(monkeypatch: pytest.MonkeyPatch, number: str, broken: bool) -> None:
    monkeypatch.setattr(machine, "installed", lambda package: number if package == "transformers" else "1.0")
    assert any(finding.what == "transformers" for finding in machine.version_findings()) == broken


def test_a_setting_that_names_no_backend(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K26_EXPERTS", "marlin")
    assert "marlin" in doctor("--checkpoint", str(tiny_folder), code=1)["experts"]["detail"]


def fixes(*options: str) -> list[list[str]]:
    result = CliRunner().invoke(app, ["doctor", "--fix", *options])
    return [shlex.split(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("damage", ["missing shard", "aria2", "cut", "bytes behind the end", "tokenizer"])
def test_the_commands_that_mend_a_checkpoint(tiny_folder: Path, tmp_path: Path, damage: str) -> None:
    """The command downloads the faulty files again. Copying them from the tiny checkpoint, which stands in for the
    published repository, mends the folder."""
    folder = tmp_path / "a folder"
    shutil.copytree(tiny_folder, folder)
    shard = sorted(folder.glob("*.safetensors"))[1]
    if damage == "missing shard":
        shard.unlink()
    elif damage == "aria2":
        Path(f"{shard}.aria2").touch()
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "bytes behind the end":
        shard.write_bytes(shard.read_bytes() + b"1234")
    else:
        (folder / "tiktoken.model").unlink()
    commands = fixes("--checkpoint", str(folder))
    expected = ["tiktoken.model", "tokenizer_config.json"] if damage == "tokenizer" else [shard.name]
    (mending,) = [command for command in commands if command[0] == "hf"]
    assert mending == [
        "hf", "download", "moonshotai/Kimi-K2.6", *expected, "--local-dir", str(folder), "--force-download",
    ]  # fmt: skip
    for name in expected:
        if (tiny_folder / name).exists():
            shutil.copy(tiny_folder / name, folder / name)
    Path(f"{shard}.aria2").unlink(missing_ok=True)
    assert not any(command[0] == "hf" for command in fixes("--checkpoint", str(folder)))


def test_the_commands_that_mend_an_environment(
    tiny_folder: Path, fake_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_engine(state(active=False, why_not="left out", no_start="no place for a cache"))
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    monkeypatch.setenv("K26_EXPERTS", "marlin")
    assert fixes()[:2] == [["unset", "VLLM_PLUGINS"], ["export", "NUMBA_CACHE_DIR=$(mktemp -d)"]]
    assert fixes()[2] == ["unset", "K26_EXPERTS"]
    monkeypatch.setattr(engines, "is_installed", lambda engine: False)
    assert ["pip", "install", "k26-plugins[sglang]"] in fixes("--engine", "sglang")


def test_bandwidths(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory's rate is of the order of numpy's copy, and the disk's rate is plausible."""
    rate = bandwidth.memory_rate(cores())
    numbers = np.ones(2**25)
    begin = time.perf_counter()
    numbers.copy()
    copied = 2 * numbers.nbytes / (time.perf_counter() - begin)
    assert copied / 10 < rate < 100 * copied
    monkeypatch.setattr(bandwidth, "READ_SECONDS", 0.2)
    found, _ = bandwidth.disk_rate(tiny_folder)
    size = sum(file.stat().st_size for file in tiny_folder.glob("*.safetensors"))
    assert size / 60 < found < 1e12


def test_each_node_reads_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two pretended NUMA nodes is read by itself, and both are read together."""
    cpu = cores()[0].cpu
    read: list[list[Core]] = []
    whole = bandwidth.memory_rate

    def memory_rate(chosen: list[Core]) -> float:
        read.append(chosen)
        return whole(chosen)

    monkeypatch.setattr(bandwidth, "memory_rate", memory_rate)
    monkeypatch.setattr(bandwidth, "cores", lambda: [Core(0, cpu), Core(1, cpu)])
    found = bandwidth.memory_finding()
    assert re.fullmatch(r"\d+ GB/s read, 2 cores \(node 0 alone \d+, node 1 alone \d+\)", found.detail)
    assert read == [[Core(0, cpu), Core(1, cpu)], [Core(0, cpu)], [Core(1, cpu)]]


def test_caches_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cpu, shared in enumerate(["0-1", "0-1", "2-3", "2-3"]):
        cache = tmp_path / f"cpu{cpu}" / "cache" / "index3"
        cache.mkdir(parents=True)
        (cache / "size").write_text("32768K\n")
        (cache / "shared_cpu_list").write_text(f"{shared}\n")
    monkeypatch.setattr(bandwidth, "CACHES", tmp_path)
    assert bandwidth.last_level_caches() == 2 * 32 * 2**20


def serve(*options: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["serve", *options])
    return result.exit_code, result.output


def test_serve_prints_the_engines_command(tiny_folder: Path, fake_engine: Any) -> None:
    fake_engine(state())
    code, output = serve(str(tiny_folder), "--gpus", "2xH200", "--context", "8192", "--dry-run", "--", "--port", "8001")
    assert code == 0, output
    last = output.strip().splitlines()[-1]
    assert last.startswith(f"vllm serve {tiny_folder} --tensor-parallel-size 2 ")
    assert last.endswith("--port 8001")
    assert "fits: 2 × H200" in output


def test_serve_stops_where_something_is_bad(tiny_folder: Path, fake_engine: Any) -> None:
    fake_engine(state(active=False, why_not="VLLM_PLUGINS is set"))
    code, output = serve(str(tiny_folder), "--dry-run")
    assert code == 1
    assert "NOT active" in output
    code, output = serve(str(tiny_folder), "--dry-run", "--anyway")
    assert code == 0
    assert output.strip().splitlines()[-1] == f"vllm serve {tiny_folder}"


def test_a_start_that_would_fail_for_this_user(tiny_folder: Path, fake_engine: Any) -> None:
    fake_engine(state(no_start="cannot cache function: no locator available: set NUMBA_CACHE_DIR to a folder"))
    found = doctor("--checkpoint", str(tiny_folder), code=1)
    assert "NUMBA_CACHE_DIR" in found["vllm: cache"]["detail"]


def test_serve_runs_the_command(tiny_folder: Path, fake_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_engine(state())
    started: list[list[str]] = []
    monkeypatch.setattr("os.execvp", lambda file, command: started.append(command))
    assert serve(str(tiny_folder), "--", "--port", "8001")[0] == 0
    assert started == [["vllm", "serve", str(tiny_folder), "--port", "8001"]]


def test_serve_without_a_gpu_for_ktransformers(tiny_folder: Path) -> None:
    code, output = serve(str(tiny_folder), "--engine", "ktransformers")
    assert code == 1
    assert "needs a GPU" in output
