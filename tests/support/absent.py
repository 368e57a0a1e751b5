"""Makes rank 1 of an engine's server behave as if it lacked the plugin; the other ranks must then refuse to start.

The server loads a test plugin in place of the real one, through an entry point, as engines find plugins.
"""

from __future__ import annotations

import os
from pathlib import Path

from support.entry_point import write_entry_point

_MODULE = '''
from datetime import timedelta

import torch.distributed as dist

from k26_plugins.{engine} import register as real
from k26_plugins.common.adapters import ranks

require = ranks.require_everywhere


def register():
    """Rank 1 builds its model as a process without the plugin does: it tells the others nothing."""
    real()
    ranks.require_everywhere = lambda switch: None if dist.get_rank() == 1 else require(switch, timedelta(seconds=5))
'''


def plugin_that_rank_1_lacks(folder: Path, engine: str, group: str) -> dict[str, str]:
    """Write the test plugin into `folder` and return the environment variables that make it the server's only plugin.

    engine: `vllm` or `sglang`. group: the group of entry points in which that engine looks for plugins.
    """
    write_entry_point(folder, "k26_absent", group, "k26_absent:register")
    (folder / "k26_absent.py").write_text(_MODULE.format(engine=engine))
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": path, f"{engine.upper()}_PLUGINS": "k26_absent"}
