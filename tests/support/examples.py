"""Runs the examples in the docstrings of a package, the lines that begin with `>>>`, by Python's doctest."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

PROMPT = ">>> "


def modules_with_examples(package: str, folder: Path) -> list[str]:
    """Return the names of the modules of `package`, which lies in `folder`, whose source has an example."""
    names = []
    for file in sorted(folder.rglob("*.py")):
        if PROMPT in file.read_text(encoding="utf-8"):
            parts = file.relative_to(folder).with_suffix("").parts
            names.append(".".join((package, *(part for part in parts if part != "__init__"))))
    return names


def run_examples(name: str, **given: object) -> None:
    """Run a module's examples, and fail if one is wrong or if doctest does not find it.

    given: names that the examples use beside those of the module.
    """
    module = import_module(name)
    assert module.__file__ is not None
    runner = doctest.DocTestRunner(verbose=False)
    report: list[str] = []
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, name, extraglobs=given):
        runner.run(test, out=report.append)
    assert not runner.failures, "".join(report)
    # doctest does not find an example in the docstring of a field, for example.
    assert runner.tries == Path(module.__file__).read_text(encoding="utf-8").count(PROMPT)
