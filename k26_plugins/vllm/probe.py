"""Finds out whether the plugin is active in the vLLM of this environment. `k26 doctor` runs it in a process of its own.

    python -m k26_plugins.vllm.probe

It runs vLLM's own plugin loading and lets vLLM's registry load the model's class, as a server's start does, and prints
one line of JSON.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from k26_plugins.common.adapters.probe import KeptErrors, say, serves_with_ours
from k26_plugins.common.model.config import ARCHITECTURE
from k26_plugins.vllm import compat, logger, names


def no_compiled_code_cache(file: str) -> str:
    """Return why numba would refuse to compile the cached functions of a module, or "" if it would compile them.

    Modules of vLLM have such functions. numba looks for a folder that it may write to: NUMBA_CACHE_DIR, a folder beside
    the module's file, one in the user's home. file: the path of a module of vLLM.
    """
    try:
        from numba.core.caching import FunctionCache
    except ImportError:
        return ""
    functions: dict[str, Any] = {}
    exec(compile("def function(): pass", file, "exec"), functions)
    try:
        FunctionCache(functions["function"])
    except (RuntimeError, OSError) as error:
        return f"{error}: set NUMBA_CACHE_DIR to a folder that the server's user may write to"
    return ""


def main() -> None:
    """Print the line of JSON for `k26 doctor`."""
    errors = KeptErrors(logger)
    compat.private(names.LOAD_GENERAL_PLUGINS)()
    registry = compat.private(names.MODEL_REGISTRY)
    say(
        "vllm",
        compat.vllm_version(),
        compat.CHECKED_VERSIONS,
        errors,
        active=serves_with_ours(lambda: registry.models[ARCHITECTURE].load_model_cls(), errors),
        no_start=no_compiled_code_cache(str(find_spec("vllm").origin)),  # type: ignore[union-attr]
        hint="VLLM_PLUGINS is set and has no k26 in it, or the entry point is gone",
    )


if __name__ == "__main__":
    main()
