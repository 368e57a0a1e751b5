"""Describe the machine that a benchmark runs on, and keep its figures in a file in `results`."""

from __future__ import annotations

import json
import os
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

from k26_plugins.common.host.cpu import cpu_model

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Return the date, the CPU, its cores, the load and the commit of this checkout.

    Call this at the start of a benchmark: the load is then other work on the cores, which makes the measured times
    longer.
    """
    command = ["git", "-C", str(RESULTS), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    cores, load = len(os.sched_getaffinity(0)), round(os.getloadavg()[0], 1)
    return {"date": date.today().isoformat(), "cpu": cpu_model(), "cores": cores, "load": load, "commit": commit}


def keep(kind: str, found: dict[str, Any], *more: str) -> Path:
    """Write figures into a JSON file named by kind, date, CPU and number of cores, and return the file.

    found: the figures, with what `machine` returned under `machine`. more: further words of the file's name.
    """
    here = found["machine"]
    words = [kind, here["date"], here["cpu"].replace(" ", "_"), f"{here['cores']}t", *more]
    file = RESULTS / f"{'-'.join(words)}.json"
    file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"kept in {file.name}")
    return file
