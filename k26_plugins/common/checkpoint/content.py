"""Verify the content of a checkpoint's files by hash, reading every byte.

The hub identifies a large file by its SHA-256, and a small file as git does: by the SHA-1 of `blob SIZE`, a zero byte
and the content. In the hub's cache, the hash is the name of the blob that a snapshot's file links to. In a folder that
`hf download --local-dir` filled, it is in a `.metadata` file. For any other folder, the user gives a manifest in the
format of `sha256sum`.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from k26_plugins.common.checkpoint.fault import Fault, Problem
from k26_plugins.common.checkpoint.header import CheckpointError
from k26_plugins.common.checkpoint.verified import Verified
from k26_plugins.common.host.control_groups import usable_cpus

_DIGEST = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")
_SNAPSHOT = re.compile(r"models--(.+)")
_MANIFEST_LINE = re.compile(r"(\\?)([0-9a-fA-F]{64}) [ *](.+)")
_METADATA = Path(".cache/huggingface/download")
CHUNK_BYTES = 2**23
MAX_THREADS = 16  # more do not make a disk faster


class Expected(NamedTuple):
    """A file and its hash: 64 hexadecimal digits are a SHA-256, 40 are git's SHA-1."""

    name: str
    """The file's path in the folder, with slashes."""
    digest: str


def expected_contents(folder: Path, manifest: Path | None = None) -> list[Expected]:
    """Return the expected hash of each file in `folder`.

    The hashes come from `manifest` if given, else from the records of the hub's client. Raises CheckpointError if the
    manifest is unreadable or if nothing records the hashes.
    """
    if manifest is not None:
        return _read_manifest(manifest)
    found = []
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        digest = file.readlink().name if file.is_symlink() else _metadata(folder, name)
        if digest is not None and _DIGEST.fullmatch(digest):
            found.append(Expected(name.as_posix(), digest))
    if not found:
        raise CheckpointError(
            f"nothing in {folder} says what its files should hold: it is neither a snapshot in the hub's cache nor was it "
            f"downloaded by `hf download --local-dir`. Give --manifest FILE, as `sha256sum` writes it."
        )
    return found


def _metadata(folder: Path, name: Path) -> str | None:
    """Return the hash that the hub's client recorded for a file; the record has three lines: commit, hash and time."""
    try:
        return (folder / _METADATA / f"{name}.metadata").read_text("utf-8").split("\n")[1].strip()
    except (OSError, IndexError, UnicodeDecodeError):
        return None


def _read_manifest(manifest: Path) -> list[Expected]:
    found = []
    try:
        lines = manifest.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"the manifest {manifest} cannot be read ({error}).") from error
    for number, line in enumerate(lines, 1):
        match = _MANIFEST_LINE.fullmatch(line)
        if match is None:
            raise CheckpointError(f"line {number} of {manifest} is not as `sha256sum` writes it: {line[:80]!r}.")
        name = match[3]
        if match[1]:  # sha256sum marks a line in which it escaped a name
            name = re.sub(r"\\(.)", lambda escape: {"n": "\n", "r": "\r"}.get(escape[1], escape[1]), name)
        found.append(Expected(name.removeprefix("./"), match[2].lower()))
    if not found:
        raise CheckpointError(f"the manifest {manifest} names no file.")
    return found


def verify_contents(
    folder: Path,
    expected: Sequence[Expected],
    verified: Verified,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> list[Problem]:
    """Read each file once, several at a time, compare their hashes, and return the faults.

    A file that is right is recorded in `verified` at once, and is not read again while it stays unchanged.
    `on_bytes(count)` is called with the number of further bytes that are done, from any thread.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(min(MAX_THREADS, usable_cpus())) as pool:
        try:
            found = pool.map(lambda one: _verify(folder / one.name, one, verified, on_bytes, stop), expected)
            return [problem for problem in found if problem is not None]
        finally:
            stop.set()  # after an interrupt, the threads need not finish their files of 10 GB


def _verify(
    file: Path, expected: Expected, verified: Verified, on_bytes: Callable[[int], None], stop: threading.Event
) -> Problem | None:
    name, digest = expected
    try:
        with file.open("rb", buffering=0) as stream:
            status = os.fstat(stream.fileno())
            if verified.is_known(file, status, digest):
                on_bytes(status.st_size)
                return None
            if len(digest) == 40:
                content = hashlib.sha1(b"blob %d\0" % status.st_size, usedforsecurity=False)
            else:
                content = hashlib.sha256()
            buffer = memoryview(bytearray(CHUNK_BYTES))
            while count := stream.readinto(buffer):
                content.update(buffer[:count])
                on_bytes(count)
                if stop.is_set():
                    return None
            after = os.fstat(stream.fileno())
    except FileNotFoundError:
        return Problem(Fault.MISSING_FILE, name, "is not in the folder: download it.")
    except OSError as error:
        return Problem(Fault.UNREADABLE, name, f"cannot be read ({error.strerror}): see `dmesg`, or download it again.")
    if (status.st_size, status.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        return Problem(Fault.WRONG_CONTENT, name, "was written while it was read: wait for its download to end.")
    if content.hexdigest() != digest:
        message = f"has the hash {content.hexdigest()}, expected {digest}: download it again (--repair says how)."
        return Problem(Fault.WRONG_CONTENT, name, message)
    verified.remember(file, status, digest)
    return None


def repair_commands(folder: Path, names: Sequence[str], hub_name: str) -> list[str]:
    """Return shell commands that delete and download the files `names`, and nothing else.

    hub_name: the model's name on the hub, used unless `folder` is a snapshot in the hub's cache, whose path holds the
    name.
    """
    folder = folder.absolute()
    commands = []
    cached = _SNAPSHOT.fullmatch(folder.parent.parent.name) if folder.parent.name == "snapshots" else None
    for name in names:
        file = folder / name
        if cached:
            # The blob is deleted first: the hub's client keeps a blob that exists, even if its content is wrong.
            blob = folder.parent.parent / "blobs" / file.readlink().name if file.is_symlink() else file
            source = [cached[1].replace("--", "/"), "--revision", folder.name]
            target = ["--cache-dir", str(folder.parent.parent.parent)]
        else:
            blob, source, target = file, [hub_name], ["--local-dir", str(folder)]
        commands.append(shlex.join(["rm", "-f", str(blob)]))
        commands.append(shlex.join(["hf", "download", *source, *target, "--include", name]))
    return commands
