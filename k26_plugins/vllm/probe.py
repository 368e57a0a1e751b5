"""Whether the plugin is active in the vLLM of this environment: run by `k26 doctor` in a process of its own.

    python -m k26_plugins.vllm.probe

vLLM's own plugin loading runs, then its registry is asked whose class it would take. Prints one line of JSON.
"""

from __future__ import annotations

from k26_plugins.common.config import ARCHITECTURE
from k26_plugins.common.probe import KeptErrors, say
from k26_plugins.vllm import compat, logger


def main() -> None:
    errors = KeptErrors(logger)
    compat.private("vllm.plugins", "load_general_plugins")()
    registry = compat.private("vllm.model_executor.models.registry", "ModelRegistry")
    module = getattr(registry.models.get(ARCHITECTURE), "module_name", "")
    say(
        compat.vllm_version(),
        compat.CHECKED_VERSIONS,
        errors,
        active=module.startswith("k26_plugins."),
        hint="VLLM_PLUGINS is set and has no k26 in it, or the entry point is gone",
    )


if __name__ == "__main__":
    main()
