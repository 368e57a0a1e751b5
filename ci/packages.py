"""Install packages into the environment that runs this script as `pip install` does, but several times faster.

    python ci/packages.py -e ".[dev]"

uv unpacks 11 GB of wheels in half a minute, for which pip takes three minutes. uv does not read pip's configuration (a
mirror, a folder of wheels), so pip installs what uv cannot find.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec


def pip(*arguments: str) -> None:
    """Run pip with these arguments. Raises CalledProcessError if pip fails."""
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True)


def install(*arguments: str) -> None:
    """Install packages by uv, and by pip if uv fails. arguments: those of `pip install`."""
    if find_spec("uv") is None:
        pip("install", "--quiet", "uv")
    uv = [sys.executable, "-m", "uv", "--system-certs", "pip", "install", "--quiet", "--python", sys.executable]
    if subprocess.run([*uv, *arguments], check=False).returncode:
        print("uv could not; pip installs", *arguments, file=sys.stderr, flush=True)
        pip("install", "--quiet", *arguments)


if __name__ == "__main__":
    install(*sys.argv[1:])
