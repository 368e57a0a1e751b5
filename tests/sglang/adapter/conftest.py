"""Registers the adapter for tests that need no server and run on the oldest supported SGLang as well as the newest."""

from __future__ import annotations

import os

from k26_plugins.sglang import register

# SGLang reads this variable when it is imported, which nothing before the registration does.
os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
register()
