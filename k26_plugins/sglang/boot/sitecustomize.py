"""Python runs a module of this name at its start. This one makes the adapter active when SGLang's first module loads.

SGLang 0.5.11 and later have an entry point and need none of this. Another `sitecustomize` on the path runs as well.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType

# `FIRST_MODULE` of names.py, which would be imported at every start of Python.
WATCHED = "sglang.srt.utils.hf_transformers_utils"


class Watcher:
    """A finder on sys.meta_path that changes nothing but what happens after one module has been executed."""

    @classmethod
    def find_spec(cls, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        if name != WATCHED:
            return None
        sys.meta_path.remove(cls)
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                from k26_plugins.sglang import register

                register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Watcher)
_elsewhere = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).parent.resolve()]
_other = PathFinder.find_spec("sitecustomize", _elsewhere)
if _other is not None and _other.loader is not None:
    _other.loader.exec_module(module_from_spec(_other))
