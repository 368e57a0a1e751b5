"""Tests of what `k26` does besides its commands: help, values that cannot be, an interrupt, and what a shell
completes."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from click.testing import CliRunner

from k26_plugins.cli import app
from k26_plugins.cli.command import Argument


def test_help_lists_commands_in_their_order_with_their_whole_first_sentence() -> None:
    shown = " ".join(CliRunner().invoke(app, ["--help"]).output.split())
    places = [shown.index(f"{name} {_first_paragraph(name)}") for name in app.commands]
    assert places == sorted(places)


def _first_paragraph(name: str) -> str:
    return " ".join(inspect.cleandoc(app.commands[name].help or "").split("\n\n")[0].split())


@pytest.mark.parametrize("name", app.commands)
def test_help_says_what_each_argument_and_option_is(name: str) -> None:
    shown = CliRunner().invoke(app, [name, "--help"])
    assert shown.exit_code == 0
    text = " ".join(shown.output.split())
    for parameter in app.commands[name].params:
        said = parameter.about if isinstance(parameter, Argument) else parameter.help
        assert said
        assert " ".join(said.split()) in text
    assert "[default: 131072; x>=1]" in text or name not in ("plan", "serve")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--engine", "VLLM"], "'VLLM' is not one of 'vllm', 'sglang', 'ktransformers'"),
        (["--context", "0"], "0 is not in the range x>=1"),
        (["--gpu-memory-utilization", "nan"], "nan is not in the range 0.05<=x<=1.0"),
    ],
)
def test_a_value_that_cannot_be(options: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["plan", "--gpus", "8xH200", *options])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert f"Invalid value for '{options[0]}': {said}" in result.stderr


def test_an_interrupt_ends_with_its_own_status(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("k26_plugins.operate.doctor.examine", interrupted)
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 130


def test_a_shell_completes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line that is installed asks `k26` for the script, and the script asks `k26` for the words."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", "/bin/bash")
    (tmp_path / ".bashrc").write_text("alias ll='ls -l'")
    for _ in range(2):
        assert CliRunner().invoke(app, ["--install-completion"]).exit_code == 0
    line = 'eval "$(_K26_COMPLETE=bash_source k26)"'
    assert (tmp_path / ".bashrc").read_text() == f"alias ll='ls -l'\n{line}\n"
    script = CliRunner().invoke(app, [], env={"_K26_COMPLETE": "bash_source"}).output
    assert "_K26_COMPLETE=bash_complete" in script
    assert CliRunner().invoke(app, ["--show-completion"]).output.strip() == script.strip()
    typed = {"COMP_WORDS": "k26 plan --engine v", "COMP_CWORD": "3", "_K26_COMPLETE": "bash_complete"}
    assert CliRunner().invoke(app, [], env=typed).output.split() == ["plain,vllm"]


def test_completion_in_a_shell_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHELL", "/bin/dash")
    result = CliRunner().invoke(app, ["--install-completion"])
    assert result.exit_code == 1
    assert "SHELL names dash: completion is there for bash, zsh, fish." in result.stderr
