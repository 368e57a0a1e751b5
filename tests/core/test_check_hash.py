"""Tests of `k26 check --hash`, which compares every byte with the hub's hashes. The judges are `sha256sum` and `git
hash-object`."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from k26_plugins.cli import app
from k26_plugins.common.checkpoint.content import Expected, expected_contents, verify_contents
from k26_plugins.common.checkpoint.verified import Verified

SECOND = "model-00002-of-000003.safetensors"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def judged(command: list[str], file: Path) -> str:
    return subprocess.run([*command, str(file)], capture_output=True, text=True, check=True).stdout.split()[0]


def sha256(file: Path) -> str:
    return judged(["sha256sum"], file)


def git_sha1(file: Path) -> str:
    return judged(["git", "hash-object", "--no-filters"], file)


@pytest.fixture(autouse=True)
def remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache home"))
    return tmp_path / "cache home" / "k26-plugins" / "verified.json"


@pytest.fixture
def snapshot(tiny_folder: Path, tmp_path: Path) -> Path:
    """Return a snapshot in the hub's cache as the hub's client lays it out: links to blobs that are named by their
    hash."""
    model = tmp_path / "hub" / "models--some--Kimi"
    folder = model / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (model / "blobs").mkdir()
    for file in tiny_folder.iterdir():
        blob = model / "blobs" / (sha256 if file.suffix == ".safetensors" else git_sha1)(file)
        shutil.copy(file, blob)
        (folder / file.name).symlink_to(os.path.relpath(blob, folder))
    return folder


def flip(file: Path) -> None:
    """Flip one bit of the last byte, which no header and no size shows. The file's modification time moves on by one
    nanosecond."""
    status = file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 4
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def run(*arguments: str, code: int = 0) -> list[str]:
    result = CliRunner().invoke(app, ["check", *arguments])
    assert result.exit_code == code, result.output
    return [line for line in result.output.splitlines() if line.strip()]


def test_a_flipped_bit_in_the_hubs_cache(snapshot: Path) -> None:
    count = len(list(snapshot.iterdir()))
    assert run(str(snapshot), "--hash")[0] == f"{count} of {count} files hold what they should."
    bad, small = snapshot / SECOND, snapshot / "tokenizer_config.json"
    expected = bad.readlink().name
    flip(bad.resolve())
    flip(small.resolve())
    assert run(str(snapshot))[-1].endswith("files are right."), "headers do not show it"
    lines = run(str(snapshot), "--hash", code=1)
    assert f"wrong content: {SECOND} has the hash {sha256(bad)}, expected {expected}" in lines[1]
    assert f"{small.name} has the hash {git_sha1(small)}, expected {small.readlink().name}" in lines[2]
    assert lines[0].startswith(
        f"{count - 2} of {count} files hold what they should, {count - 2} of them in an earlier run"
    )
    assert lines[-1] == "error: 2 faults."


def test_the_commands_that_repair(snapshot: Path) -> None:
    """The commands remove the bad blob and download its file alone. The `rm` is run here, the `hf download` is only
    read."""
    flip((snapshot / SECOND).resolve())
    blob = (snapshot / SECOND).resolve()
    lines = [line for line in run(str(snapshot), "--repair", code=1) if line.startswith(("rm ", "hf "))]
    assert [shlex.split(line) for line in lines] == [
        ["rm", "-f", str(blob)],
        [
            "hf",
            "download",
            "some/Kimi",
            "--revision",
            COMMIT,
            "--cache-dir",
            str(snapshot.parents[2]),
            "--include",
            SECOND,
        ],
    ]
    subprocess.run(lines[0], shell=True, check=True)
    assert f"missing file: {SECOND} is not in the folder" in "\n".join(run(str(snapshot), "--hash", code=1))


def test_a_manifest_as_sha256sum_writes_it(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "a folder"))
    (folder / "odd\nname\\").touch()
    names = sorted(file.name for file in folder.iterdir())
    manifest = tmp_path / "SHA256SUMS"
    with manifest.open("w") as out:
        subprocess.run(["sha256sum", *names], cwd=folder, stdout=out, check=True)
    assert (
        run(str(folder), "--manifest", str(manifest))[0] == f"{len(names)} of {len(names)} files hold what they should."
    )
    flip(folder / SECOND)
    lines = run(str(folder), "--manifest", str(manifest), "--repair", code=1)
    assert lines[1].startswith(f"wrong content: {SECOND}")
    assert f"rm -f {shlex.quote(str(folder / SECOND))}" in lines
    judge = subprocess.run(["sha256sum", "-c", "--quiet", str(manifest)], cwd=folder, capture_output=True, text=True)
    assert judge.stdout.startswith(f"{SECOND}: FAILED")


@pytest.mark.parametrize("text", ["", "no hash  model.safetensors\n", "abc\n"])
def test_a_manifest_that_is_none(tiny_folder: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "m").write_text(text)
    assert "manifest" in run(str(tiny_folder), "--manifest", str(tmp_path / "m"), code=1)[0].replace(
        str(tmp_path / "m"), "manifest"
    )


def test_what_the_client_wrote_beside_a_local_folder(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "local"))
    kept = folder / ".cache/huggingface/download"
    kept.mkdir(parents=True)
    (kept / f"{SECOND}.metadata").write_text(f"{COMMIT}\n{sha256(folder / SECOND)}\n1750000000.1\n")
    lines = run(str(folder), "--hash")
    assert lines[0] == "1 of 1 files hold what they should."
    assert "model-00001-of-000003.safetensors has no hash to hold it against." in lines
    flip(folder / SECOND)
    assert f"wrong content: {SECOND}" in "\n".join(run(str(folder), "--hash", code=1))


def test_nothing_says_what_files_should_hold(tiny_folder: Path) -> None:
    assert "Give --manifest FILE" in run(str(tiny_folder), "--hash", code=1)[0]


def test_what_was_right_is_not_read_again_while_it_stays(
    snapshot: Path, remembered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that was right is known again by its path, size, time and inode. With another expected hash, time or inode
    it is read again."""
    expected = expected_contents(snapshot)
    assert verify_contents(snapshot, expected, Verified()) == []
    assert set(json.loads(remembered.read_text())) == {str((snapshot / one.name).resolve()) for one in expected}
    monkeypatch.setattr("hashlib.sha256", None)  # a file that is hashed from here on raises TypeError
    again = Verified()
    assert verify_contents(snapshot, expected, again) == []
    assert again.num_known == len(expected)
    file = (snapshot / SECOND).resolve()
    with pytest.raises(TypeError):
        verify_contents(snapshot, [Expected(SECOND, "0" * 64)], Verified())
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(TypeError):
        verify_contents(snapshot, expected, Verified())
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    shutil.copy2(file, f"{file}.copy")
    Path(f"{file}.copy").replace(file)
    with pytest.raises(TypeError):
        verify_contents(snapshot, expected, Verified())


def test_a_memory_that_cannot_be_kept_costs_time_only(snapshot: Path, tmp_path: Path) -> None:
    (tmp_path / "cache home").write_text("a file where the folder should be")
    for _ in range(2):
        assert "in an earlier run" not in run(str(snapshot), "--hash")[0]


def test_bytes_are_counted_once(snapshot: Path) -> None:
    counts: list[int] = []
    expected = expected_contents(snapshot)
    verify_contents(snapshot, expected, Verified(), counts.append)
    total = sum((snapshot / one.name).stat().st_size for one in expected)
    assert sum(counts) == total
    verify_contents(snapshot, expected, Verified(), counts.append)
    assert sum(counts) == 2 * total
