"""What the files in containers/ start: the commands, and which of them are an engine's."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import yaml
from support.documented import ROOT

FOLDER = ROOT / "containers"
RAY = FOLDER / "ray-two-machines.sh"
IMAGES = {engine: FOLDER / f"{engine}.Dockerfile" for engine in ("vllm", "sglang", "ktransformers")}
MANIFESTS = {engine: FOLDER / f"kubernetes/{engine}-two-machines.yaml" for engine in ("vllm", "sglang")}


def instruction(file: Path, name: str) -> list[str]:
    """The words of an image's ENTRYPOINT or CMD."""
    (words,) = re.findall(rf"^{name} (\[.*\])$", file.read_text(encoding="utf-8"), re.MULTILINE)
    found = json.loads(words)
    assert isinstance(found, list)
    return found


def manifest(engine: str, kind: str) -> dict[str, Any]:
    """The manifest's object of that kind."""
    documents = yaml.safe_load_all(MANIFESTS[engine].read_text(encoding="utf-8"))
    (found,) = (document for document in documents if document["kind"] == kind)
    assert isinstance(found, dict)
    return found


def pods(engine: str) -> list[dict[str, Any]]:
    """The specifications of the first machine's pod and of the others'."""
    templates = manifest(engine, "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]
    return [templates[name]["spec"] for name in ("leaderTemplate", "workerTemplate")]


def served(engine: str) -> list[list[str]]:
    """The engine's command on each machine, with the variables as LeaderWorkerSet fills them in."""
    commands = []
    for rank, pod in enumerate(pods(engine)):
        (container,) = pod["containers"]
        values = {"$(LWS_LEADER_ADDRESS)": "HEAD_ADDRESS", "$(LWS_WORKER_INDEX)": str(rank)}
        words = list(container["command"])
        for variable, value in values.items():
            words = [word.replace(variable, value) for word in words]
        commands.append(words)
    return commands


def ray_commands() -> list[list[str]]:
    """The script's commands that begin with `ray` or `vllm`, in its order."""
    text = re.sub(r" *\\\n *", " ", RAY.read_text(encoding="utf-8")).replace('"$address:6379"', "HEAD_ADDRESS:6379")
    lines = [line.strip().removeprefix("exec ") for line in text.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith(("ray ", "vllm "))]
