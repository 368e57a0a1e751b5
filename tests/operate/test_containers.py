"""Tests that containers/ starts what the planner says, and that the doctor's command there ends a start on a bad
checkpoint."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from support import containers
from support.containers import IMAGES, MANIFESTS, RAY, instruction, manifest, pods, ray_commands, served

from k26_plugins.cli import app
from k26_plugins.operate.plan.command import with_ray

ADDRESS = ["--host", "0.0.0.0", "--port", "8000"]


def planned(engine: str) -> list[list[str]]:
    """Return the commands that the `k26 plan` of the manifests prints, with the model's sizes as published."""
    command = ["plan", "--engine", engine, "--gpus", "16xH100", "--context", "65536", "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    commands: list[list[str]] = json.loads(result.output)["commands"]
    names = {"moonshotai/Kimi-K2.6": "/model", "python": "python3"}
    return [[names.get(word, word) for word in each] for each in commands]


@pytest.mark.parametrize("engine", MANIFESTS)
def test_manifests_start_what_is_planned(engine: str) -> None:
    assert f"k26 plan --engine {engine} --gpus 16xH100 --context 65536" in MANIFESTS[engine].read_text(encoding="utf-8")
    first, other = planned(engine)
    assert served(engine) == [[*first, *ADDRESS], other]


def test_ray_starts_what_is_planned() -> None:
    first = planned("vllm")[0]
    head, serve, worker = with_ray("vllm", first[: first.index("--nnodes")], 2)
    assert ray_commands() == [head, [*serve, *ADDRESS], [*worker, "--block"]]


@pytest.mark.parametrize("engine", MANIFESTS)
def test_the_service_leads_to_the_first_machine(engine: str) -> None:
    workload, service = manifest(engine, "LeaderWorkerSet"), manifest(engine, "Service")
    templates = workload["spec"]["leaderWorkerTemplate"]
    assert workload["spec"]["leaderWorkerTemplate"]["size"] == len(served(engine))
    assert service["spec"]["selector"] == templates["leaderTemplate"]["metadata"]["labels"]
    assert service["spec"]["selector"] != templates["workerTemplate"]["metadata"]["labels"]
    (container,) = pods(engine)[0]["containers"]
    (port,) = container["ports"]
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    assert container["command"][-2:] == ["--port", str(port["containerPort"])]


@pytest.mark.parametrize("engine", MANIFESTS)
def test_mounts_are_of_the_pods_volumes(engine: str) -> None:
    for pod in pods(engine):
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in (*pod["initContainers"], *pod["containers"]):
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes


@pytest.mark.parametrize("damaged", [False, True], ids=["whole", "damaged"])
def test_a_machine_with_a_bad_checkpoint_does_not_join(
    damaged: bool, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Engines are looked at in their own environments, by tests/vllm and tests/sglang; bandwidth is no verdict.
    monkeypatch.setattr("k26_plugins.operate.doctor.engine_findings", lambda required: [])
    monkeypatch.setattr("k26_plugins.operate.doctor.bandwidth_findings", lambda checkpoint: [])
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    if damaged:
        shard = next(folder.glob("*.safetensors"))
        shard.write_bytes(shard.read_bytes()[:-100])
    commands = {engine: container["command"] for engine in MANIFESTS for pod in pods(engine)
                for container in pod["initContainers"]}  # fmt: skip
    assert commands == {engine: [*commands["vllm"][:-1], engine] for engine in MANIFESTS}
    program, *arguments = [str(folder) if word == "/model" else word for word in commands["vllm"]]
    assert program == "k26"
    assert CliRunner().invoke(app, arguments).exit_code == int(damaged)


@pytest.mark.parametrize("engine", IMAGES)
def test_an_image_plans_looks_and_serves(engine: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image's whole command runs for two named GPUs, up to the start of the engine's program."""
    monkeypatch.setattr("k26_plugins.operate.doctor.engine_findings", lambda required: [])
    program, *command = [*instruction(IMAGES[engine], "ENTRYPOINT"), *instruction(IMAGES[engine], "CMD")]
    assert program == "k26"
    at = command.index("--")
    options = ["--gpus", "2xH200", "--dry-run", "--ram", "1000"]
    command = [str(tiny_folder) if word == "/model" else word for word in (*command[:at], *options, *command[at:])]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip().endswith(" ".join(ADDRESS))


def test_files_that_an_image_copies_are_there() -> None:
    ignored = (containers.ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    for file in IMAGES.values():
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.startswith("COPY "):
                for name in line.split()[1:-1]:
                    assert (containers.ROOT / name).exists(), f"{file.name}: {name}"
                    assert name not in ignored


def test_the_ray_script_says_how_it_is_called() -> None:
    done = subprocess.run(["bash", str(RAY)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "first | other ADDRESS" in done.stderr
