"""Tests of the package as it is published: the files in its archives, and its commands in an environment without the
clone."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.documented import ROOT

from k26_plugins.cli import app

pytest.importorskip("build", reason="needs the package build")
packaging = pytest.importorskip("packaging.requirements")


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the source distribution and the wheel that is built from it, as a release has them."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (source,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return source, wheel


def tracked(*folders: str) -> set[str]:
    """Return the files of the repository's folders, without those that git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return {name for name in listed.splitlines() if (ROOT / name).exists()}


def test_the_archives_hold_every_file(archives: tuple[Path, Path]) -> None:
    source, wheel = archives
    with tarfile.open(source) as archive:
        inside = {name.split("/", 1)[1] for name in archive.getnames()}
    assert tracked() - inside == set()
    assert inside - tracked() == {"PKG-INFO"}
    with zipfile.ZipFile(wheel) as archive:
        installed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert installed == {name.removeprefix("kernels/") for name in tracked("k26_plugins", "kernels/k26_kernels")}


def required(name: str, extra: str = "") -> Iterator[metadata.Distribution]:
    """Yield the distributions that `name` requires with this extra, or with none, and those that they require in
    turn."""
    for line in metadata.requires(name) or []:
        requirement = packaging.Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            yield metadata.distribution(requirement.name)
            for wanted in requirement.extras or {""}:
                yield from required(requirement.name, wanted)


@pytest.fixture(scope="module")
def clean(archives: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of programs of an environment with the wheel and its requirements, and none of the other
    packages here.

    The requirements are linked and not installed again, because torch alone takes 200 MB.
    """
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", str(folder / "bin/python")]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", str(archives[1])], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for distribution in required("k26-plugins"):
        for entry in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / entry).is_symlink():
                (site / entry).symlink_to(str(distribution.locate_file(entry)))
    return folder / "bin"


def test_commands_run_without_the_clone(clean: Path, tmp_path: Path) -> None:
    """The first half of the demonstration runs, and the reference model answers as in the clone."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
        return done.stdout

    k26 = str(clean / "k26")
    assert str(clean.parent) in run(str(clean / "python"), "-c", "import k26_plugins; print(k26_plugins.__file__)")
    assert "generate" in run(k26, "--help")
    run(k26, "tiny", "DIR")
    run(k26, "check", "DIR")
    question = ("generate", "DIR", "Hello", "--max-new-tokens", "4")
    answer = run(k26, *question)
    here = CliRunner().invoke(app, [question[0], str(tmp_path / "DIR"), *question[2:]])
    assert answer.strip()
    assert answer == here.stdout
