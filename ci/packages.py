"""Install packages into the environment that runs this script: `pip install`, several times faster.

    python ci/packages.py -e ".[dev]"

uv unpacks 11 GB of wheels in half a minute, where pip takes three. It knows nothing of pip's configuration (a mirror, a
folder of wheels): what it cannot find, pip installs.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True)


def install(*arguments: str) -> None:
    """arguments: as of `pip install`."""
    if find_spec("uv") is None:
        pip("install", "--quiet", "uv")
    uv = [sys.executable, "-m", "uv", "--system-certs", "pip", "install", "--quiet", "--python", sys.executable]
    if subprocess.run([*uv, *arguments], check=False).returncode:
        print("uv could not; pip installs", *arguments, file=sys.stderr, flush=True)
        pip("install", "--quiet", *arguments)


if __name__ == "__main__":
    install(*sys.argv[1:])
