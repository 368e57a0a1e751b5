"""A server one of whose ranks lacks the plugin: through an entry point of the tests' own, as an engine finds plugins."""

from __future__ import annotations

import os
from pathlib import Path

_MODULE = '''
from datetime import timedelta

import torch.distributed as dist

from k26_plugins.{engine} import register as real
from k26_plugins.common import ranks

require = ranks.require_everywhere


def register():
    """Rank 1 builds its model as a process without the plugin does: it tells the others nothing."""
    real()
    ranks.require_everywhere = lambda switch: None if dist.get_rank() == 1 else require(switch, timedelta(seconds=5))
'''


def plugin_that_rank_1_lacks(folder: Path, engine: str, group: str) -> dict[str, str]:
    """What to set for the server: `k26_absent` is then the one plugin that it loads."""
    info = folder / "k26_absent-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: k26-absent\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\nk26_absent = k26_absent:register\n")
    (folder / "k26_absent.py").write_text(_MODULE.format(engine=engine))
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": path, f"{engine.upper()}_PLUGINS": "k26_absent"}
