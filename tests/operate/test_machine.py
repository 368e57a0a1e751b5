"""Tests of how this machine's GPUs are found with drivers that answer, do not answer, or are missing, and of its users'
output files, proxies and programs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from support.doctor import doctor
from support.local_http import QuietHandler, serving

from k26_plugins.cli import app
from k26_plugins.common.tiny.checkpoint import make_tiny
from k26_plugins.operate import accelerators, machine
from k26_plugins.operate.accelerators import Accelerator, AcceleratorError
from k26_plugins.operate.plan.gpus import MIB
from k26_plugins.operate.verify.connect import asks_environment, connect

SMI = """#!/bin/sh
case "$*" in *--query-gpu=name,memory.total,driver_version*) ;; *) exit 2;; esac
"""
MISMATCH = "Failed to initialize NVML: Driver/library version mismatch\\nNVML library version: 580.95"


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes a `nvidia-smi` with the given body, on a machine without NVML."""

    def write(body: str) -> None:
        (tmp_path / "nvidia-smi").write_text(SMI + body)
        (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setattr(accelerators, "NVML", "libno-such-driver.so")
        monkeypatch.setattr(accelerators, "DEVICES", tmp_path)

    return write


def test_gpus_by_the_command(smi: Any) -> None:
    smi("echo 'NVIDIA H200, 143771, 580.95.05'; echo 'NVIDIA H200, 143771, 580.95.05'")
    assert accelerators.nvidia() == [Accelerator("NVIDIA H200", 143771 * MIB, "nvidia", "580.95.05")] * 2


def test_a_driver_that_cannot_be_asked_is_no_missing_gpu(smi: Any) -> None:
    smi(f"printf '{MISMATCH}'; exit 18")
    with pytest.raises(AcceleratorError, match="Driver/library version mismatch"):
        accelerators.nvidia()
    smi("echo 'No devices were found'; exit 6")
    assert accelerators.nvidia() == []


def test_devices_without_a_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(accelerators, "NVML", "libno-such-driver.so")
    monkeypatch.setattr(accelerators, "DEVICES", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AcceleratorError, match="install its driver"):
        accelerators.nvidia()
    (tmp_path / "nvidia0").unlink()
    assert accelerators.nvidia() == []


def test_amd_by_the_kernels_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, memory in enumerate((196592 * MIB, 512 * MIB)):
        device = tmp_path / f"card{number}" / "device"
        device.mkdir(parents=True)
        (device / "vendor").write_text("0x1002\n")
        (device / "mem_info_vram_total").write_text(f"{memory}\n")
        (device / "product_name").write_text("AMD Instinct MI300X OAM\n")
    monkeypatch.setattr(accelerators, "AMD_CARDS", tmp_path)
    assert accelerators.amd() == [Accelerator("AMD Instinct MI300X OAM", 196592 * MIB, "amd", "amdgpu")]


def test_a_driver_that_hangs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(accelerators, "SECONDS", 0.2)
    with pytest.raises(AcceleratorError, match="does not answer within"):
        accelerators.accelerators()


def test_the_gpus_that_a_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Accelerator(f"GPU {index}", index, "nvidia", "") for index in range(4)]
    for setting, expected in (("1,3", [1, 3]), ("", []), ("GPU-5f1a,GPU-77aa", [0, 1]), ("0,9", [0])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
        assert [item.memory for item in accelerators._visible(found, "nvidia")] == expected


def test_plan_reads_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [Accelerator("NVIDIA H100 80GB HBM3", 81559 * MIB, "nvidia", "580.95")] * 4
    monkeypatch.setattr(machine, "accelerators", lambda: gpus)
    monkeypatch.setattr(machine, "total_bytes", lambda: 768 * 10**9)
    monkeypatch.setattr(machine, "own_cores", lambda: 48)
    monkeypatch.setattr(machine, "own_sockets", lambda: 3)
    result = CliRunner().invoke(app, ["plan", "--engine", "ktransformers", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert (found["gpus"], found["gpu"]) == (4, "H100")
    command = found["command"]
    # Each of four ranks keeps one of the 48 cores.
    assert command[command.index("--kt-cpuinfer") + 1] == "44"
    assert command[command.index("--kt-threadpool-count") + 1] == "3"


@pytest.mark.parametrize(("gpus", "code"), [([], 1), (None, 1)])
def test_plan_without_a_gpu_or_with_a_broken_driver(
    monkeypatch: pytest.MonkeyPatch, gpus: list[Accelerator] | None, code: int
) -> None:
    def ask() -> list[Accelerator]:
        if gpus is None:
            raise AcceleratorError("Driver/library version mismatch")
        return gpus

    monkeypatch.setattr(machine, "accelerators", ask)
    result = CliRunner().invoke(app, ["plan"])
    assert result.exit_code == code
    assert ("has no GPU" if gpus == [] else "version mismatch") in result.output


def test_a_broken_driver_starts_no_cpu_server(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[Accelerator]:
        raise AcceleratorError("Driver/library version mismatch")

    monkeypatch.setattr("k26_plugins.operate.accelerators.accelerators", broken)
    monkeypatch.setattr("k26_plugins.operate.doctor.machine.accelerators", broken)
    result = CliRunner().invoke(app, ["serve", str(tiny_folder), "--dry-run"])
    assert result.exit_code == 1
    assert "version mismatch" in result.output
    assert doctor("--checkpoint", str(tiny_folder), code=1)["GPU"]["level"] == "BAD"


def test_serve_takes_the_program_beside_its_python(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service starts `k26 serve` with the system's PATH, which lacks the engine's program."""
    program = tmp_path / "vllm"
    program.write_text("")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setattr("k26_plugins.operate.accelerators.accelerators", lambda: [])
    monkeypatch.setattr("k26_plugins.operate.doctor.examine", lambda *args, **options: [])
    started: list[list[str]] = []
    monkeypatch.setattr("os.execvp", lambda file, command: started.append([file, os.environ["PATH"], *command]))
    assert CliRunner().invoke(app, ["serve", str(tiny_folder)]).exit_code == 0
    assert started == [[str(program), f"{tmp_path}{os.pathsep}/usr/bin", str(program), "serve", str(tiny_folder)]]


@pytest.mark.parametrize(
    "command",
    [
        "profile DIR --prompts prompts.jsonl --save no/where",
        "golden DIR --prompts prompts.jsonl --out no/where",
        "verify --url http://localhost:1 --golden golden --json no/where",
        "verify --url http://localhost:1 --golden golden --html .",
        "compare http://localhost:1 http://localhost:2 --prompts prompts.jsonl --json no/where",
        "swarm --url http://localhost:1 --json no/where",
        "media photo.png --sheet no/where.png",
    ],
)
def test_outputs_are_tried_before_the_work(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs are tried before inputs are even looked at: none of the inputs exists here."""
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == (2 if command.split()[0] in ("verify", "compare", "swarm") else 1), result.output
    assert "cannot be written" in result.output or "matplotlib" in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_proxy_of_another_kind(monkeypatch: pytest.MonkeyPatch, golden_file: Path) -> None:
    monkeypatch.setenv("ALL_PROXY", "nonsense://localhost:1080")
    result = CliRunner().invoke(app, ["verify", "--url", "http://models.example", "--golden", str(golden_file)])
    assert result.exit_code == 2, result.output
    assert "NO_PROXY" in result.output
    assert "Traceback" not in result.output


class Models(QuietHandler):
    def do_GET(self) -> None:  # noqa: N802
        found = self.path == "/v1/models"
        self.send(200 if found else 404, json.dumps({"data": [{"id": "K2.6"}]}).encode())


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "socks5://127.0.0.1:9"])
def test_this_machine_is_reached_without_the_proxy(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ALL_PROXY", "HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, proxy)
    with serving(Models) as url:
        for address in (url, url.replace("127.0.0.1", "localhost")):
            assert connect(address).model == "K2.6"


def test_no_proxy_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "models.example,.inside")
    addresses = ("http://models.example:8000", "http://a.inside", "http://[::1]:8000", "http://elsewhere.example")
    assert [asks_environment(address) for address in addresses] == [False, False, False, True]


def test_weights_are_for_whom_the_umask_lets_read(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        make_tiny(tmp_path / "tiny")
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for file in (tmp_path / "tiny").iterdir()} == {oct(0o640)}


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = CliRunner().invoke(app, ["tiny", str(tmp_path / "file" / "DIR")])
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert result.output.startswith("error:")
