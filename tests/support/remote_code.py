"""Adds the published checkpoint's Python files to a tiny checkpoint; each leaves a mark if it is executed."""

from __future__ import annotations

import shutil
from pathlib import Path

# The modules, and in each the class, that the published config.json, tokenizer_config.json and preprocessor_config.json
# name.
MODULES = {
    "configuration_kimi_k25": "KimiK25Config",
    "modeling_kimi_k25": "KimiK25ForConditionalGeneration",
    "tokenization_kimi": "TikTokenTokenizer",
    "kimi_k25_processor": "KimiK25Processor",
    "kimi_k25_vision_processing": "KimiK25VisionProcessor",
}


def plant(source: Path, folder: Path) -> Path:
    """Copy a tiny checkpoint to `folder`, add all of MODULES, and return the file that exists once one was executed."""
    shutil.copytree(source, folder)
    mark = folder.parent / "executed"
    for module, name in MODULES.items():
        code = f"open({str(mark)!r}, 'a').write({module + ' '!r})\nclass {name}:\n    pass\n"
        (folder / f"{module}.py").write_text(code, encoding="utf-8")
    named = "".join(
        (folder / f"{name}.json").read_text() for name in ("config", "tokenizer_config", "preprocessor_config")
    )
    assert all(f"{module}.{name}" in named for module, name in MODULES.items()), "the checkpoint names other modules"
    return mark
