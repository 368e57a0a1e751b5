"""Remember between runs which files were verified.

After an interruption, hashing 595 GB need not start again at the first byte.
"""

from __future__ import annotations

import json
import os
import threading
from contextlib import suppress
from pathlib import Path

from k26_plugins.common.host.cache_folder import cache_folder


class Verified:
    """The hashes of verified files by path, size, modification time and inode, kept in the user's cache folder.

    If the cache folder cannot be written, nothing is remembered, which only costs time.
    """

    def __init__(self) -> None:
        self.file = cache_folder() / "verified.json"
        self._lock = threading.Lock()
        self.num_known = 0
        """Files that did not have to be read again."""

    def is_known(self, file: Path, status: os.stat_result, digest: str) -> bool:
        """Return whether `digest` was remembered for the file in the state `status`. A hit counts in `num_known`."""
        with self._lock:
            known = self._read().get(str(file.resolve())) == [*_mark(status), digest]
            self.num_known += known
        return known

    def remember(self, file: Path, status: os.stat_result, digest: str) -> None:
        """Keep a file's hash for later runs; do nothing if the cache folder cannot be written."""
        with self._lock:
            # The hashes are read again, because another run may have written some meanwhile.
            known = self._read() | {str(file.resolve()): [*_mark(status), digest]}
            scratch = self.file.with_name(f".{self.file.name}.{os.getpid()}")
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                scratch.write_text(json.dumps(known, indent=1) + "\n", "utf-8")
                scratch.replace(self.file)
            except OSError:
                with suppress(OSError):
                    scratch.unlink(missing_ok=True)

    def _read(self) -> dict[str, list[int | str]]:
        try:
            known = json.loads(self.file.read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}


def _mark(status: os.stat_result) -> list[int]:
    return [status.st_size, status.st_mtime_ns, status.st_ino]
