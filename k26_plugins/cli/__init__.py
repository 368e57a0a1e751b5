"""The command line `k26`, with a module for each group of commands.

Heavy modules are imported only inside the command that needs them, so that `k26 --help` is quick.
"""

from __future__ import annotations

from k26_plugins.cli.checkpoint import check, tensors, tiny
from k26_plugins.cli.command import Group
from k26_plugins.cli.completion import COMPLETION
from k26_plugins.cli.doctor import doctor
from k26_plugins.cli.generate import generate
from k26_plugins.cli.golden import golden
from k26_plugins.cli.media import media
from k26_plugins.cli.merge import merge
from k26_plugins.cli.plan import plan
from k26_plugins.cli.profile import profile
from k26_plugins.cli.serve import serve
from k26_plugins.cli.swarm import swarm
from k26_plugins.cli.tune import tune
from k26_plugins.cli.verify import compare, verify

app = Group(
    "k26",
    help="Kimi-K2.6 for vLLM, SGLang and KTransformers: does it fit, what do I run, is it right, why is it not.",
    commands=[
        tensors,
        check,
        tiny,
        merge,
        generate,
        media,
        plan,
        doctor,
        golden,
        verify,
        compare,
        profile,
        swarm,
        tune,
        serve,
    ],
    params=COMPLETION,
    context_settings={"show_default": True},
)
