"""Tests of hooks around an engine's functions: what they replace, that each is put there only once, and which arguments
they are given."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest

from k26_plugins.common.adapters.engine import Engine, EngineName, UnsupportedEngineError
from k26_plugins.common.adapters.hooks import Later
from k26_plugins.common.adapters.registration import Registration

SOURCE = """
def double(number): return 2 * number

class Base:
    def of_object(self, number): return self, number
    @classmethod
    def of_class(cls, number): return cls, number
    @staticmethod
    def of_nobody(number): return None, number

class Heir(Base): pass
"""


def negative(original: Callable[..., Any], *args: Any) -> Any:
    return original(*args[:-1], -args[-1])


@pytest.fixture
def engine() -> Iterator[Any]:
    """Yield a module with functions of every kind; a second module has imported one of the functions by name."""
    made, other = ModuleType("engine_with_functions"), ModuleType("imported_from_it")
    exec(SOURCE, vars(made))
    made.__spec__ = ModuleSpec(made.__name__, None)
    vars(other).update(double=made.double)
    sys.modules.update({made.__name__: made, other.__name__: other})
    yield made
    for name in (made.__name__, other.__name__):
        del sys.modules[name]


def named(path: str) -> EngineName:
    return EngineName("engine_with_functions", path, why="test it", remove_when="never")


@pytest.mark.parametrize("owner", ["Base", "Heir"])
def test_each_kind_of_method_stays_of_its_kind(engine: Any, owner: str) -> None:
    its, base = getattr(engine, owner), dict(vars(engine.Base))
    Engine({}, "").hook(negative, *(named(f"{owner}.{name}") for name in ("of_object", "of_class", "of_nobody")))
    one = its()
    assert one.of_object(2) == (one, -2)
    assert its.of_class(2) == one.of_class(2) == (its, -2)
    further: Any = type("Further", (its,), {})
    assert further.of_class(2)[0].__name__ == "Further"
    assert its.of_nobody(2) == one.of_nobody(2) == (None, -2)
    assert owner == "Base" or dict(vars(engine.Base)) == base, "what a class inherits stays its base's"


@pytest.mark.parametrize("everywhere", [True, False])
def test_a_function_is_replaced_in_its_module_or_wherever_it_was_imported(engine: Any, everywhere: bool) -> None:
    Engine({}, "", wraps_everywhere=everywhere).hook(negative, named("double"))
    assert engine.double(2) == -4
    assert sys.modules["imported_from_it"].double(2) == (-4 if everywhere else 4)


def test_the_same_hook_is_put_once_and_another_around_it(engine: Any) -> None:
    def more(original: Callable[..., Any], number: int) -> Any:
        return original(number) + 1

    for _ in range(2):
        Engine({}, "").hook(negative, named("double"))
        Engine({}, "").hook(Later(__name__, "negative"), named("Base.of_nobody"))
    Engine({}, "").hook(more, named("double"))
    assert engine.double(2) == -3
    assert engine.Base.of_nobody(2) == (None, -2)


def test_hooks_are_put_all_or_none_and_taken_back(engine: Any) -> None:
    with pytest.raises(UnsupportedEngineError, match=r"has no engine_with_functions\.triple"):
        Engine({"engine": "1 to 2"}, "").hook(negative, named("double"), named("triple"))
    before, changes = [dict(vars(one)) for one in (engine, engine.Base, engine.Heir)], Registration()
    for path in ("double", "Base.of_class", "Heir.of_object"):
        Engine({}, "", wraps_everywhere=True).wrap(changes, named(path), negative)
    changes.call(lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    with pytest.raises(ZeroDivisionError):
        changes.apply()
    assert [dict(vars(one)) for one in (engine, engine.Base, engine.Heir)] == before
    assert sys.modules["imported_from_it"].double is engine.double


def test_a_hook_is_imported_when_it_is_called() -> None:
    later = Later("k26_plugins.common.nothing", "here")
    assert later == Later("k26_plugins.common.nothing", "here") != Later("k26_plugins.common.nothing", "there")
    with pytest.raises(ModuleNotFoundError, match=r"k26_plugins\.common\.nothing"):
        later(1)
    assert Later("operator", "add")(1, 2) == 3
