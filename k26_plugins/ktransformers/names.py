"""Lists every name of kt-kernel that this adapter touches and that kt-kernel does not promise to keep.

tests/core/test_engine_names.py compares this table with the Python files of each checked release; these do not show
what the compiled extension contains. docs/upgrading.md says what to do when a release has lost one of the names.
"""

from __future__ import annotations

from k26_plugins.common.adapters.engine import EngineName

# Values of `remove_when` that several entries share.
_INTERFACE = "kt-kernel documents an interface of its experts for other engines than KTransformers' fork of SGLang"
_CHOICE = "kt-kernel's RAWINT4 is chosen by a documented name"

EXTENSION = EngineName(
    "kt_kernel",
    "kt_kernel_ext",
    why="hand experts to the extension that was compiled for this CPU",
    remove_when=_INTERFACE,
)
CPU_INFER = EngineName(
    "kt_kernel.experts_base",
    "BaseMoEWrapper._get_cpu_infer",
    why="share kt-kernel's thread pools, of which a process has one set",
    remove_when=_INTERFACE,
)
CHOOSE_RAW_INT4 = EngineName(
    "kt_kernel.utils.amx",
    "_select_rawint4_backend",
    why="have the class for this CPU that takes the checkpoint's INT4 bytes as they are",
    remove_when=_CHOICE,
    since="0.6.2.post3",
)
RAW_INT4_ON_AMX = EngineName(
    "kt_kernel.utils.amx",
    "AMXInt4_KGroup_MOE",
    why=CHOOSE_RAW_INT4.why,
    remove_when="no release below 0.6.2.post3 is served",
)
CPU_VARIANT = EngineName(
    "kt_kernel",
    "__cpu_variant__",
    # kt-kernel 0.6.1 offers its AMX code on every CPU, and ends the process on a CPU without AMX.
    why="take code for AMX on a CPU with AMX only",
    remove_when=RAW_INT4_ON_AMX.remove_when,
)
