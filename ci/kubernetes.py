"""Validate the manifests in containers/kubernetes against Kubernetes' own schemas.

    python ci/kubernetes.py containers/kubernetes/vllm-two-machines.yaml …

A LeaderWorkerSet is not one of Kubernetes' own kinds, so each of its pod templates is validated as a Pod.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml


def objects(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file for which Kubernetes has a schema."""
    for document in yaml.safe_load_all(file.read_text(encoding="utf-8")):
        if document["kind"] != "LeaderWorkerSet":
            yield document
            continue
        templates = document["spec"]["leaderWorkerTemplate"]
        for name in ("leaderTemplate", "workerTemplate"):
            template = templates[name]
            metadata = {"name": document["metadata"]["name"], **template["metadata"]}
            yield {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def main(files: list[str]) -> None:
    version = kubernetes_validate.latest_version()
    for file in files:
        kinds = []
        for described in objects(Path(file)):
            kubernetes_validate.validate(described, version, strict=True)
            kinds.append(described["kind"])
        print(f"{file}: {', '.join(kinds)} as Kubernetes {version} has them")


if __name__ == "__main__":
    main(sys.argv[1:])
