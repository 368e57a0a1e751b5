"""These tests need no server, and run on the oldest supported SGLang as on the newest: the adapter is registered here."""

from __future__ import annotations

import os

from k26_plugins.sglang import register

# Read when SGLang is imported, which nothing before the registration does.
os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
register()
