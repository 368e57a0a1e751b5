"""Serves one model, the files of a folder, like ModelScope's hub, as far as the hub's own client asks for it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from support.local_http import QuietHandler, serving


@contextmanager
def modelscope_hub(name: str, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Run the hub until the block ends, and yield its URL and a list to which the name of every fetched file is added.

    name: the model's name on the hub, `owner/model`. folder: the model's files.
    """
    root = f"/api/v1/models/{name}/repo"
    fetched: list[str] = []

    class Handler(QuietHandler):
        def do_GET(self) -> None:  # noqa: N802 - the name that http.server looks for
            asked = urlsplit(self.path)
            if asked.path != root:
                self._answer(_listing(folder) if asked.path == f"{root}/files" else {})
                return
            file = parse_qs(asked.query)["FilePath"][0]
            if not (folder / file).exists():
                self.send(404, b"{}")
                return
            fetched.append(file)
            self.send(200, (folder / file).read_bytes())

        def do_POST(self) -> None:  # noqa: N802 - the name that http.server looks for
            """Accept the client's login."""
            self._answer({})

        def _answer(self, data: dict[str, Any]) -> None:
            self.send(200, json.dumps({"Code": 200, "Success": True, "Data": data, "Message": "success"}).encode())

    with serving(Handler) as address:
        yield address, fetched


def _listing(folder: Path) -> dict[str, Any]:
    def entry(file: Path) -> dict[str, Any]:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        return {"Name": file.name, "Path": file.name, "Type": "blob", "Size": file.stat().st_size, "Sha256": digest}

    return {"Files": [entry(file) for file in sorted(folder.iterdir())]}
