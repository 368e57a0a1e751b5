"""Tests of files that programs outside the repository read: everything that these files name exists. The nox session
`docs` looks at their form."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from support.documented import ROOT

import k26_plugins

sys.path.insert(0, str(ROOT / "ci"))
import release

nox = pytest.importorskip("nox")

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


@pytest.fixture(scope="module")
def noxfile() -> ModuleType:
    spec = importlib.util.spec_from_file_location("noxfile", ROOT / "ci/noxfile.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sessions(noxfile: ModuleType) -> set[str]:
    from nox import registry

    return set(registry.get())


def read(file: Path) -> dict[Any, Any]:
    loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


def steps(file: Path) -> Iterator[dict[str, Any]]:
    for job in read(file)["jobs"].values():
        yield from job["steps"]


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_what_a_workflow_runs_is_there(file: Path, sessions: set[str]) -> None:
    """The commands of a workflow name sessions of the noxfile and scripts of ci/ that exist."""
    called = [word for step in steps(file) for word in shlex.split(step.get("run", ""), comments=True)]
    assert called
    for word in called:
        assert not word.startswith("ci/") or (ROOT / word).is_file(), word
    for line in (line for step in steps(file) for line in step.get("run", "").splitlines() if " nox " in line):
        for name in line.partition(" -s ")[2].replace("${{ matrix.session }}", "").split():
            assert name in sessions, name
    for step in steps(file):
        # An action is named by a release's tag or branch, because a main branch changes from day to day.
        assert "uses" not in step or re.fullmatch(r"[\w.-]+/[\w./-]+@(v\d+|release/v\d+)", step["uses"]), step


def test_every_session_of_ci_has_a_machine(noxfile: ModuleType) -> None:
    (job,) = read(ROOT / ".github/workflows/ci.yml")["jobs"].values()
    assert job["strategy"]["matrix"]["session"] == list(noxfile.CI)


def test_types_are_checked_of_every_file() -> None:
    """mypy is given the folders of tests/ and the scripts of ci/ by their names, so none may be missing there."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    folders = {file.relative_to(ROOT / "tests").parts[0] for file in (ROOT / "tests").glob("*/**/*.py")}
    assert {"support", *(f"tests.{folder}" for folder in folders - {"support"})} <= set(settings["packages"])
    files = {"tests": (ROOT / "tests").glob("*.py"), "": (ROOT / "ci").glob("*.py")}
    modules = {f"{folder}.{file.stem}".lstrip(".") for folder, found in files.items() for file in found}
    assert modules <= set(settings["modules"])


def test_only_the_publisher_of_a_release_may_write() -> None:
    """A workflow that runs on somebody else's change has a token that can publish nothing."""
    for file in WORKFLOWS:
        workflow = read(file)
        assert workflow["permissions"] == {"contents": "read"}, file.name
        writing = {name: job.get("permissions", {}) for name, job in workflow["jobs"].items()}
        allowed = {"build": {"contents": "read", "id-token": "write", "attestations": "write"}}
        allowed["publish"] = {"contents": "write", "id-token": "write"}
        for name, permissions in writing.items():
            assert permissions == (allowed[name] if file.name == "release.yml" else {}), (file.name, name)


def test_a_release_is_made_of_its_own_tag(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    version = k26_plugins.__version__
    assert release.version() == version
    with pytest.raises(SystemExit, match=r"the tag is v99.0.0"):
        release.main("v99.0.0")
    part = f"## [Unreleased]\n\n## [{version}] - 2026-12-01\n\n### Added\n\n- This.\n\n## [0.0.1] - 2026-01-01\n\n- That.\n"
    assert release.notes(version, part) == "### Added\n\n- This."
    with pytest.raises(SystemExit, match="has no part"):
        release.notes(version, part.replace(" - 2026-12-01", ""))


def test_the_change_log_names_every_command() -> None:
    from k26_plugins.cli import app

    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert app.commands
    assert [name for name in app.commands if not re.search(rf"`(k26 )?{name}`", text)] == []


def test_bug_reports_ask_for_the_doctor() -> None:
    form = read(ROOT / ".github/ISSUE_TEMPLATE/bug.yml")
    required = [field for field in form["body"] if field.get("validations", {}).get("required")]
    assert any("k26 doctor" in field["attributes"]["label"] for field in required)


def test_updates_look_where_there_is_something() -> None:
    for update in read(ROOT / ".github/dependabot.yml")["updates"]:
        assert (ROOT / update["directory"].strip("/")).is_dir(), update


@pytest.mark.parametrize(
    ("name", "newest"), [("vllm", "VLLM_NEWEST"), ("sglang", "SGLANG_NEWEST"), ("ktransformers", "SGLANG_NEWEST")]
)
def test_containers_have_the_newest_engines_that_ci_tests(noxfile: ModuleType, name: str, newest: str) -> None:
    lines = (ROOT / f"containers/{name}.Dockerfile").read_text(encoding="utf-8").splitlines()
    assert f"ARG VERSION={getattr(noxfile, newest)}" in lines
    kernels = [line.split()[-1] for line in lines if "install_kt_kernel.py " in line and line.startswith("RUN")]
    assert kernels == ([noxfile.KT_KERNELS[-1]] if name == "ktransformers" else [])
