"""Makes the adapter active when SGLang's first module loads: Python runs a module named `sitecustomize` at its start.

SGLang 0.5.11 and later have an entry point and do not need this module. If there is another `sitecustomize` on the
path, this module runs it too.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType

# This repeats `FIRST_MODULE` of names.py, because importing that module would slow down every start of Python.
WATCHED = "sglang.srt.utils.hf_transformers_utils"


class Watcher:
    """A finder on sys.meta_path that has the plugin registered as soon as one module has been executed."""

    @classmethod
    def find_spec(cls, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        """Find SGLang's first module, and have the plugin register once it is executed."""
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
