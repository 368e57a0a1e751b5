"""Check that a tag is this version's, and print what CHANGELOG.md says of the version, for the release's page.

    python ci/release.py v0.1.0

The program ends with a message if the tag names another version, or if the change log has no part for the version.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def version() -> str:
    """Return the package's version, which is read without importing the package."""
    text = (ROOT / "k26_plugins/__init__.py").read_text(encoding="utf-8")
    (found,) = re.findall(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    return str(found)


def notes(wanted: str, changes: str) -> str:
    """Return the part of the change log under `## [wanted] - date`, without its heading. Raises SystemExit if none."""
    for part in re.split(r"^## ", changes, flags=re.MULTILINE)[1:]:
        heading, _, text = part.partition("\n")
        if re.fullmatch(rf"\[{re.escape(wanted)}\] - \d{{4}}-\d\d-\d\d", heading):
            return text.strip()
    sys.exit(f"CHANGELOG.md has no part `## [{wanted}] - YEAR-MONTH-DAY`: give the one called Unreleased that heading")


def main(tag: str) -> None:
    """Print the notes of the release with this tag. Raises SystemExit if the tag is not this version's."""
    if tag != f"v{version()}":
        sys.exit(
            f"the tag is {tag}, the package is v{version()}: set __version__ in k26_plugins/__init__.py or tag again"
        )
    print(notes(version(), (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")))


if __name__ == "__main__":
    main(sys.argv[1])
