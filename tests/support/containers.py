"""Reads the commands that the files in containers/ start: Dockerfiles, Kubernetes manifests and the script for Ray."""

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
    """Return the words of a Dockerfile's instruction in exec form. name: `ENTRYPOINT` or `CMD`."""
    (words,) = re.findall(rf"^{name} (\[.*\])$", file.read_text(encoding="utf-8"), re.MULTILINE)
    found = json.loads(words)
    assert isinstance(found, list)
    return found


def manifest(engine: str, kind: str) -> dict[str, Any]:
    """Return the one object of this kind in the engine's manifest."""
    documents = yaml.safe_load_all(MANIFESTS[engine].read_text(encoding="utf-8"))
    (found,) = (document for document in documents if document["kind"] == kind)
    assert isinstance(found, dict)
    return found


def pods(engine: str) -> list[dict[str, Any]]:
    """Return two pod specifications: that of the first machine, and that of every other machine."""
    templates = manifest(engine, "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]
    return [templates[name]["spec"] for name in ("leaderTemplate", "workerTemplate")]


def served(engine: str) -> list[list[str]]:
    """Return the engine's command on each of the two machines, with its variables filled in as LeaderWorkerSet does."""
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
    """Return the words of the commands in Ray's script that begin with `ray` or `vllm`, in the script's order."""
    text = re.sub(r" *\\\n *", " ", RAY.read_text(encoding="utf-8")).replace('"$address:6379"', "HEAD_ADDRESS:6379")
    lines = [line.strip().removeprefix("exec ") for line in text.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith(("ray ", "vllm "))]
