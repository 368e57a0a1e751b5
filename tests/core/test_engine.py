"""Tests that an engine's names are looked up by their entries in an adapter's table. The standard library stands in for
an engine."""

from __future__ import annotations

import json.decoder
import subprocess
import sys

import pytest

from k26_plugins.common.adapters.engine import Engine, EngineName, UnsupportedEngineError

ENGINE = Engine({"pytest": "1 to 2", "nowhere": "3"}, "run without it", "Pytest")


def entry(module: str, path: str) -> EngineName:
    return EngineName(module, path, why="read numbers", remove_when="nothing reads them")


METHOD = entry("json.decoder", "JSONDecoder.decode")


def test_an_entry_is_its_place() -> None:
    assert str(METHOD) == "json.decoder.JSONDecoder.decode"
    assert ENGINE.private(METHOD) is json.decoder.JSONDecoder.decode
    assert ENGINE.private(METHOD.owner) is json.decoder.JSONDecoder
    assert ENGINE.private(METHOD.owner.owner) is json.decoder
    assert vars(ENGINE.private(METHOD.owner))[METHOD.attribute] is json.decoder.JSONDecoder.decode


@pytest.mark.parametrize(
    "gone", [entry("json.decoder", "JSONDecoder.here"), entry("json.nothing", "Here"), entry("json", "a.b")]
)
def test_one_that_is_gone_is_one_error(gone: EngineName) -> None:
    assert not ENGINE.has(gone)
    with pytest.raises(UnsupportedEngineError) as raised:
        ENGINE.private(gone)
    assert str(raised.value) == (
        f"Pytest {pytest.__version__} has no {gone}, which k26-plugins needs to read numbers: it was checked on Pytest "
        f"1 to 2. Install one of these, or run without it."
    )


def test_a_member_of_an_object_is_found_in_whichever_class() -> None:
    strict = entry("json.decoder", "JSONDecoder.strict")  # an attribute that only objects of the class have
    assert ENGINE.member(json.JSONDecoder(strict=False), strict) is False
    with pytest.raises(
        UnsupportedEngineError, match=r"has no json\.decoder\.JSONDecoder\.strict, which .* to read numbers"
    ):
        ENGINE.member(json.JSONEncoder, strict)


def test_without_the_engine_the_import_is_the_error() -> None:
    with pytest.raises(ImportError, match="no_such_engine"):
        ENGINE.private(entry("no_such_engine.module", "Here"))
    assert not ENGINE.has(entry("no_such_engine.module", "Here"))


def test_of_several_the_first_that_is_there_counts() -> None:
    moved = entry("json.nothing", "decode")
    assert ENGINE.first(moved, METHOD) is METHOD
    assert ENGINE.first(METHOD, entry("json", "loads")) is METHOD
    assert ENGINE.first(moved, entry("json", "nothing")) is moved


def test_asking_for_a_module_imports_none_of_it() -> None:
    """Only the packages that hold the module are imported, and making an entry imports nothing."""
    code = (
        "import sys\n"
        "from k26_plugins.common.adapters.engine import Engine, EngineName\n"
        "name = EngineName('xml.dom.minidom', 'parse', why='', remove_when='')\n"
        "before = [one for one in sys.modules if one.startswith('xml')]\n"
        "print(before, Engine({}, '').has_module(name), 'xml.dom.minidom' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] True False"


@pytest.mark.parametrize("adapter", ["vllm", "sglang", "ktransformers"])
def test_a_table_imports_nothing_of_its_engine(adapter: str) -> None:
    code = (
        f"import sys, k26_plugins.{adapter}.names\n"
        "print([one for one in ('vllm', 'sglang', 'kt_kernel', 'torch', 'transformers', 'numpy') if one in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
