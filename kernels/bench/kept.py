"""The machine that a benchmark ran on, and the file in `results` that keeps what it found."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """What the benchmark runs on. Call it at the start: other work on the cores, the load, lengthens what is measured."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor()
    command = ["git", "-C", str(RESULTS), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    cores, load = len(os.sched_getaffinity(0)), round(os.getloadavg()[0], 1)
    return {"date": date.today().isoformat(), "cpu": cpu, "cores": cores, "load": load, "commit": commit}


def keep(kind: str, found: dict[str, Any], *more: str) -> Path:
    """Write `found`, which has its `machine`, into a file named by its kind, date and CPU, and what more tells it apart."""
    here = found["machine"]
    words = [kind, here["date"], here["cpu"].replace(" ", "_"), f"{here['cores']}t", *more]
    file = RESULTS / f"{'-'.join(words)}.json"
    file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"kept in {file.name}")
    return file
