"""Tests that the commands of README and docs run as written, on the tiny checkpoint, and that generated parts are up to
date."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.adapters import MODULES
from support.documented import NOT_RUN, PAGES, README, ROOT, RUN_BY, commands, lines
from support.endpoint import serve_reference

from k26_plugins.cli import app
from k26_plugins.common.checkpoint import Checkpoint
from k26_plugins.common.tiny.adapter import Adapter
from k26_plugins.operate.doctor import engines
from k26_plugins.operate.golden.variants import BY_NAME

sys.path.insert(0, str(ROOT / "ci"))
import hardware_table


def k26_commands(page: Path) -> list[str]:
    return [command for command in commands(page) if command.startswith("k26 ") and command not in NOT_RUN]


@pytest.mark.parametrize("page", [page for page in PAGES if k26_commands(page)], ids=lambda page: page.name)
def test_commands_run_as_written(
    page: Path,
    tiny_folder: Path,
    prompts_file: Path,
    golden_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_folder, "DIR")
    shutil.copy(tiny_folder / "config.json", "config.json")
    shutil.copy(golden_file, "golden.safetensors")
    Adapter.draw(Checkpoint(tiny_folder), MODULES, seed=0).write(Path("ADAPTER"), "model.")
    for file in prompts_file.parent.iterdir():
        shutil.copy(file, file.name)
    started: list[list[str]] = []
    monkeypatch.setattr("os.execvp", lambda file, command: started.append(command))
    # Engines are looked at in their own environments, by tests/vllm and tests/sglang.
    monkeypatch.setattr(engines, "engine_findings", lambda required: [])
    monkeypatch.setattr("k26_plugins.operate.doctor.engine_findings", lambda required: [])
    with serve_reference(tiny_folder) as url, serve_reference(tiny_folder, speak=lambda messages: "Yes.") as talker:
        for line in k26_commands(page):
            # The reference model is no server for hundreds of agents.
            is_swarm = line.startswith("k26 swarm")
            command = re.sub(r"http://localhost:\d+", talker if is_swarm else url, line)
            if is_swarm:
                command += " --agents 2 --steps 6 --prefix-tokens 20 --answer-tokens 1 --replays 2 --tool-latency 0"
            if command.startswith("k26 tiny"):
                shutil.rmtree("DIR")
            result = CliRunner().invoke(app, shlex.split(command)[1:])
            assert result.exit_code == 0, f"{line}\n{result.output}"
    assert len(started) == sum("k26 serve" in line for line in k26_commands(page))


def test_every_other_command_is_run_somewhere_or_has_a_reason() -> None:
    """A new command without a test or a reason fails here, and so does an entry whose command or test is gone."""
    assert lines(README) == commands(README), "README has a block that is no command: mend support/documented.py"
    others = {line for page in PAGES for line in commands(page)} - {
        line for page in PAGES for line in k26_commands(page)
    }
    listed = {*RUN_BY, *NOT_RUN}
    assert others == {command for command in listed if command in NOT_RUN or not command.startswith("k26 ")}
    for command, (file, text) in RUN_BY.items():
        assert text in (ROOT / file).read_text(encoding="utf-8"), f"{file} no longer runs {command}"


def test_the_hardware_table_is_what_the_planner_says() -> None:
    text = hardware_table.FILE.read_text(encoding="utf-8")
    assert text == hardware_table.written(text), "run: python ci/hardware_table.py"


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_suspect_says_what_to_do() -> None:
    assert all(variant.remedy for variant in BY_NAME.values() if variant.is_suspect)


@pytest.mark.parametrize(
    "command", [None, *sorted(name for name in ("plan", "doctor", "golden", "verify", "compare", "serve", "swarm"))]
)
def test_help_teaches(command: str | None) -> None:
    result = CliRunner().invoke(app, [command, "--help"] if command else ["--help"])
    assert result.exit_code == 0
    assert len(result.output) > 600


def test_every_question_has_one_place() -> None:
    """There are twenty questions. The test of links asserts that their places exist."""
    rows = re.findall(
        r"^\| (.+\?) \| \[[^\]]+\]\(([^)]+)\) \|$", (ROOT / "docs/where.md").read_text(encoding="utf-8"), re.M
    )
    assert len(dict(rows)) == len({place for _, place in rows}) == 20


def test_parts_of_documents_that_code_names_are_there() -> None:
    """Comments name parts of a document, such as `docs/model.md, 4.4`, and files of docs/. All of them exist."""
    headings = re.findall(r"^(?:## |\*\*)(\d(?:\.\d)?)\b", (ROOT / "docs/model.md").read_text(encoding="utf-8"), re.M)
    named: set[str] = set()
    for folder in ("k26_plugins", "kernels", "tests"):
        for file in (ROOT / folder).rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            named |= set(re.findall(r"docs/model\.md, (\d\.\d)", text))
            for page in re.findall(r"\bdocs/([\w-]+\.md)\b", text):
                assert (ROOT / "docs" / page).exists(), f"{file} names docs/{page}"
    assert named
    assert named <= set(headings)
