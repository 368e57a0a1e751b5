"""Run commands, several at a time, and show the output of each when it has ended.

    python ci/side_by_side.py mypy "pytest -q tests/kernels"

The program ends with 1 if a command failed; the other commands are still run to their end.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed

# Most of the work is starting the engines' servers, each of which takes a core for itself and up to 6 GB.
AT_ONCE = min(2, os.cpu_count() or 1)


def run(command: str) -> tuple[str, int, float, str]:
    """Run a command, and return the command, its exit status, its seconds and its output."""
    started = time.monotonic()
    print(f"[{time.strftime('%H:%M:%S')}] {command}: started", flush=True)
    done = subprocess.run(
        shlex.split(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False
    )
    return command, done.returncode, time.monotonic() - started, done.stdout


def main(commands: list[str]) -> int:
    """Run all commands, and return 1 if one of them failed, else 0."""
    ended = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for future in as_completed([pool.submit(run, command) for command in commands]):
            command, status, seconds, output = future.result()
            line = f"{command}: {'passed' if status == 0 else f'FAILED with {status}'} after {seconds:.0f} s"
            print(f"{output}[{time.strftime('%H:%M:%S')}] {line}", flush=True)
            ended.append((line, status))
    print("\n".join(line for line, _ in ended))
    return int(any(status for _, status in ended))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
