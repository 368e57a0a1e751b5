"""Tests of the table of settings: its reader, its one form of error, and docs/settings.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from k26_plugins.common.settings import TABLE, Setting, check_settings

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"
WRONG = "no such thing"
each_setting = pytest.mark.parametrize("setting", TABLE, ids=lambda setting: setting.variable)


def documented() -> list[tuple[str, str, str]]:
    """Return the plugin's rows of the page, without their links, as (variable, values, meaning)."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", PAGE.read_text())
    return re.findall(r"^\| `(K26_\w+)` \| (.*?) \| (.*) \|$", text, re.MULTILINE)


def test_the_page_has_every_setting_and_no_other() -> None:
    assert [variable for variable, _, _ in documented()] == [setting.variable for setting in TABLE]


@each_setting
def test_its_row_has_its_values_and_begins_with_its_meaning(setting: Setting[object]) -> None:
    (row,) = [row for row in documented() if row[0] == setting.variable]
    words = [f"`{word}`" for word in setting.words()]
    assert row[1] == ", ".join([*words, *([setting.other] if setting.other else [])])
    assert re.match(rf"{re.escape(setting.meaning)}($|[:;,. ])", row[2])


@each_setting
def test_every_word_is_taken_in_any_case_and_the_first_is_the_default(
    setting: Setting[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(setting.variable, raising=False)
    unset = setting.read()
    values = []
    for word in setting.words():
        monkeypatch.setenv(setting.variable, f" {word.upper()} ")
        values.append(setting.read())
    assert len(set(values)) == len(values)
    if setting.default:
        assert values[0] == unset
    else:
        assert not unset


@each_setting
def test_a_wrong_value_is_named_with_those_that_are_right(
    setting: Setting[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(setting.variable, WRONG)
    *others, last = setting.choices()
    right = f"{', '.join(others)} or {last}" if others else last
    with pytest.raises(ValueError, match=re.escape(f"{setting.variable} is {WRONG!r}: choose {right}, or unset it.")):
        check_settings()


@pytest.mark.parametrize("variable", ["K26_CPU_THREADS", "K26_STREAM_FROM"])
@pytest.mark.parametrize("number", ["0", "-1", "1.5"])
def test_a_number_is_whole_and_positive(variable: str, number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "12")
    (setting,) = [setting for setting in TABLE if setting.variable == variable]
    assert setting.read() == 12
    monkeypatch.setenv(variable, number)
    with pytest.raises(ValueError, match=f"{variable} is '{number}': choose .*a number of"):
        setting.read()
