"""Keeps every Python file that a checkpoint brings or names from being executed, whatever `--trust-remote-code` says.

Every engine comes to such code through two functions of transformers: `resolve_trust_remote_code` decides whether to
trust the code, and `get_class_from_dynamic_module` loads it. Both refuse this model's code from the moment that the
plugin is registered in a process.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from k26_plugins.common.adapters.registration import Registration


class RemoteCodeError(ValueError):
    """Python code of the checkpoint was asked for, and no class of transformers or of the plugin takes its place.

    The message says which code, and what to do.
    """


def refuse_remote_code(changes: Registration) -> None:
    """Note hooks around both functions of transformers that lead to a checkpoint's code.

    Calling this function again does no harm. Other models are served as before.
    """
    doors = importlib.import_module("transformers.dynamic_module_utils")
    changes.wrap(doors, "resolve_trust_remote_code", _trust, everywhere=True)
    changes.wrap(doors, "get_class_from_dynamic_module", _load, everywhere=True)


def _trust(
    original: Callable[..., Any],
    trust: Any,
    name: Any,
    has_local_code: bool,
    has_remote_code: bool,
    *rest: Any,
    **named: Any,
) -> Any:
    """Refuse to trust this model's code, so that transformers takes its own class.

    Raises RemoteCodeError if transformers has none.
    """
    if not has_remote_code or not _is_this_model(name, None):
        return original(trust, name, has_local_code, has_remote_code, *rest, **named)
    if not has_local_code:
        raise _refusal(f"a class of {name}")
    return False


def _load(original: Callable[..., Any], class_reference: str, name: Any, *rest: Any, **named: Any) -> Any:
    if any(_is_this_model(name, named.get(revision)) for revision in ("revision", "code_revision")):
        raise _refusal(f"{class_reference} of {name}")
    return original(class_reference, name, *rest, **named)


def _is_this_model(name: Any, revision: str | None) -> bool:
    # Not imported at the top: registration must be cheap, and this module imports the tokenizer's libraries.
    from k26_plugins.common.prompt.hf_tokenizer import is_this_model

    return is_this_model(name, revision)


def _refusal(what: str) -> RemoteCodeError:
    return RemoteCodeError(
        f"{what} is Python code that comes with the checkpoint, and k26-plugins executes none for Kimi-K2.6, with or "
        f"without --trust-remote-code. Leave out the flag that asks for it, such as --tokenizer-mode: the plugin's own "
        f"tokenizer, processor and model need none."
    )
