"""Tests of `ci/gpu.sh` without a GPU: scripts stand in for the tools that it calls."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "ci" / "gpu.sh"

TOOLS = {
    # The benchmark is reported to take too long, without a wait.
    "timeout": 'echo "${*:3}" >> "$CALLS"; case "$*" in *bench.experts*) exit 124; esac; exec /usr/bin/timeout "$@"',
    "nvidia-smi": "echo a GPU",
    "ncu": 'exec "${@:9}"',
    "python3": """
case "$*" in
  *tests/kernels*) echo one failed; exit 1 ;;
  *--layer*--tokens*) yes | head -c 3000000 ;;
  *tune*--ep*) head -c 20000000 /dev/zero > "${@: -1}" ;;
  *tune*) echo outcome > "${@: -1}" ;;
esac
""",
}


def test_every_step_runs_and_what_failed_is_said(tmp_path: Path) -> None:
    tools, calls, out = tmp_path / "tools", tmp_path / "calls", tmp_path / "results"
    tools.mkdir()
    for name, body in TOOLS.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:/usr/bin:/bin", "CALLS": str(calls)}
    done = subprocess.run([SCRIPT, out], env=environment, capture_output=True, text=True, timeout=60, check=False)
    summary = (out / "summary.txt").read_text().splitlines()
    assert summary == [
        "4 steps failed",
        "tests: exit status 1",
        "sanitizer: compute-sanitizer is not on this machine",
        "benchmark: not done after 140 s",
        "tune-ep8.json was too large to keep",
    ]
    assert (done.returncode, done.stdout.splitlines()[-5:]) == (4, summary)
    order = [
        "nvidia-smi",
        "test_gpu.py",
        "compute-sanitizer",
        "--tp 1",
        "--tp 8",
        "--ep 8",
        "bench.experts",
        "ncu",
        "ncu",
    ]
    assert all(word in call for word, call in zip(order, calls.read_text().splitlines(), strict=True))
    assert (out / "tune-tp1.json").read_text() == "outcome\n"
    assert (out / "ncu-64.log").stat().st_size == 1_000_000
    assert sum(file.stat().st_size for file in out.iterdir()) < 16e6


def test_what_it_calls_is_there() -> None:
    """The files and options that the script calls exist; the stand-ins would not notice that one is missing."""
    text = SCRIPT.read_text()
    root = SCRIPT.parents[1]
    assert (root / "tests/kernels/test_gpu.py").exists()
    for module, options in (
        ("one_launch", ("--layer", "--tokens")),
        ("experts", ("--layers", "--seconds", "--folder")),
    ):
        assert f"bench.{module}" in text
        source = (root / f"kernels/bench/{module}.py").read_text()
        assert all(f'"{option}"' in source for option in options)
