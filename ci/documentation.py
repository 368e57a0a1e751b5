"""Hooks of the documentation site (mkdocs.yml): add pages from outside docs/, and a page for each public module.

Documents link to each other and to files by their paths in the repository, so that they can be read there. In the site,
a link to another document leads to its page. A link to any other file becomes the file's path as text, as long as the
site has no address of the repository (`repo_url`). A link to nothing ends the build.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
DOCS = Path("docs")
OUTSIDE = {
    "README.md": "index.md",
    **{name: name.lower() for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "CODE_OF_CONDUCT.md")},
    "kernels/bench/results/README.md": "results.md",
}
"""Files of the repository outside docs/, and the page of the site that each is made into."""

PACKAGES = {"k26_plugins.common": Path("k26_plugins/common"), "k26_kernels": Path("kernels/k26_kernels")}
"""The packages whose API the site documents, with their folders."""

_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")


def modules() -> list[str]:
    """Return the dotted names of the public modules, packages included."""
    found = []
    for package, folder in PACKAGES.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            if not any(part.startswith("_") for part in parts):
                found.append(".".join((package, *parts)))
    return found


def on_config(config: Any) -> Any:
    """Replace files in the navigation by their pages, add the pages of the API, and return the configuration."""

    def placed(entry: Any) -> Any:
        if isinstance(entry, dict):
            return {title: placed(inside) for title, inside in entry.items()}
        if isinstance(entry, list):
            return [placed(inside) for inside in entry]
        return OUTSIDE.get(entry, entry)

    pages = [{name: f"api/{name}.md"} for name in modules()]
    config.nav = [*placed(config.nav), {"API": pages}]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that do not lie in docs/ to the site's files, and return the files."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for name in modules():
        files.append(File.generated(config, f"api/{name}.md", content=f"::: {name}\n"))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Return a page's Markdown with its links changed to the site's. Raises PluginError for a link to nothing."""
    here = page.file.src_uri
    sources = {target: source for source, target in OUTSIDE.items()}
    source = Path(sources.get(here, DOCS / here))

    def lead(match: re.Match[str]) -> str:
        text, target = match.groups()
        path, _, anchor = target.partition("#")
        if not path or ":" in path:
            return match.group()
        meant = os.path.normpath(source.parent / path)
        if not (ROOT / meant).exists():
            raise PluginError(f"{source} links to {path}, which is not there")
        found = OUTSIDE.get(meant) or (
            os.path.relpath(meant, DOCS) if meant.startswith("docs/") and meant.endswith(".md") else None
        )
        if found is None:
            return f"[{text}]({config.repo_url}/blob/main/{meant})" if config.repo_url else f"{text} (`{meant}`)"
        return f"[{text}]({os.path.relpath(found, Path(here).parent)}{'#' + anchor if anchor else ''})"

    return _LINK.sub(lead, markdown)
