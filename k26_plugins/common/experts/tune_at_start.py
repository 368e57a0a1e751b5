"""Measure a rank's experts when a server first meets them (K26_TUNE=start), in a process of its own."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import torch

from k26_plugins.common.experts.outcome import Key, outcome_file
from k26_plugins.common.settings import TUNE

# The measurement is a program of its own, so that its CUDA context and memory end with it. It is started by name
# because the core imports no command.
COMMAND = (sys.executable, "-m", "k26_plugins.operate.tune")
LIMIT = 300.0
"""Seconds after which a measurement, which should take under a minute, counts as hanging."""


def measure(key: Key, engine: str, device: torch.device) -> str | None:
    """Measure what `key` names with the kernels of `engine`, unless another process just did.

    Returns why it failed, or None. If several ranks or servers start with the same key, one of them measures and the
    others wait.
    """
    file = outcome_file(key)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if file.exists():
                return None
            return _run([*COMMAND, key.shape, engine], file, device)
    except OSError as error:
        return f"{file.parent} cannot be written ({error.strerror})"


def _run(command: list[str], file: Path, device: torch.device) -> str | None:
    environment = {name: value for name, value in os.environ.items() if name != TUNE.variable}
    environment |= visible_alone(device)
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return f"it did not end within {LIMIT:.0f} s"
    if done.returncode or not file.exists():
        lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        return lines[-1].rstrip(".")
    return None


def visible_alone(device: torch.device) -> dict[str, str]:
    """Return the environment variable with which another process sees this GPU and no other; empty for a CPU."""
    if device.type != "cuda":
        return {}
    variable = "HIP_VISIBLE_DEVICES" if torch.version.hip else "CUDA_VISIBLE_DEVICES"
    index = torch.cuda.current_device() if device.index is None else device.index
    seen = os.environ.get(variable)
    return {variable: seen.split(",")[index] if seen else str(index)}
