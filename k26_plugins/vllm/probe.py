"""Whether the plugin is active in the vLLM of this environment: run by `k26 doctor` in a process of its own.

    python -m k26_plugins.vllm.probe

vLLM's own plugin loading runs, then its registry loads the model's class, as a start does. Prints one line of JSON.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from k26_plugins.common.adapters.probe import KeptErrors, say, serves_with_ours
from k26_plugins.common.model.config import ARCHITECTURE
from k26_plugins.vllm import compat, logger, names


def no_compiled_code_cache(file: str) -> str:
    """Why numba would refuse to compile the functions of `file` that it is to cache, which vLLM's modules have; else "".

    It looks for a folder that it may write to: NUMBA_CACHE_DIR, beside the file, in the user's home.
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
