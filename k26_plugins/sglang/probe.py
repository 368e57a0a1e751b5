"""Finds out whether the plugin is active in the SGLang of this environment. `k26 doctor` runs it in a process of its
own.

    python -m k26_plugins.sglang.probe

It runs SGLang's own plugin loading, asks SGLang's registries which configuration class and which model class they would
take, and prints one line of JSON.
"""

from __future__ import annotations

from k26_plugins.common.adapters.probe import KeptErrors, say, serves_with_ours
from k26_plugins.sglang import compat, logger, names

# The command that a user types where SGLang has no entry point. It keeps what is on PYTHONPATH already.
PATH_LINE = 'export PYTHONPATH="$(python -m k26_plugins.sglang.boot)${PYTHONPATH:+:$PYTHONPATH}"'


def main() -> None:
    """Print the line of JSON for `k26 doctor`."""
    errors = KeptErrors(logger)
    hint, fix = "SGLANG_PLUGINS is set and has no k26 in it, or the entry point is gone", ""
    if compat.has_entry_point():
        compat.private(names.LOAD_PLUGINS)()
    else:
        hint = f"this SGLang has no plugins, and takes this one from its path alone: {PATH_LINE}"
        fix = PATH_LINE
        compat.private(names.FIRST_MODULE)
    registered = compat.registered_config()
    active = registered is not None and registered.__module__.startswith("k26_plugins.")
    active = active and serves_with_ours(compat.registered_model, errors)
    package, found = compat.distribution()
    say(package, found, compat.CHECKED_VERSIONS[package], errors, active=active, hint=hint, fix=fix)


if __name__ == "__main__":
    main()
