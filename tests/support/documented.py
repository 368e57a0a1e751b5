"""Reads the commands in README and docs, and says which test or CI file runs each and with what names and sizes.

A command that neither RUN_BY nor NOT_RUN lists fails `tests/operate/test_docs.py`, which itself runs those that begin
with `k26`.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]

VLLM = "vllm serve moonshotai/Kimi-K2.6 -tp 8 --mm-encoder-tp-mode data"
SGLANG = "python -m sglang.launch_server --model-path moonshotai/Kimi-K2.6 --tp 8"
HYBRID = (
    "python -m sglang.launch_server --model-path DIR --kt-weight-path DIR --tp 4 --kt-num-gpu-experts 96 --kt-cpuinfer 64 "
    "--disable-cuda-graph"
)
KT_RUN = (
    "kt run DIR --kt-method RAWINT4 --gpu-experts 96 --cpu-threads 64 --numa-nodes 2 --tp 4 --max-total-tokens 131072"
)
PLAIN_VLLM, PLAIN_SGLANG = "vllm serve DIR", "python -m sglang.launch_server --model-path DIR"
LORA_VLLM = "vllm serve moonshotai/Kimi-K2.6 --enable-lora --max-loras 2 --max-lora-rank 32"
EAGLE3_VLLM = (
    """vllm serve DIR --speculative-config '{"method": "eagle3", "model": "DRAFT", "num_speculative_tokens": 3}'"""
)
SERVE_VLLM, SERVE_SGLANG = "k26 serve --engine vllm DIR", "k26 serve --engine sglang DIR"

SUBSTITUTED = {
    "moonshotai/Kimi-K2.6": "DIR",  # and DIR is the tiny checkpoint
    "-tp 8": "-tp 2",
    "--tp 8": "--tp 2",
    "--tp 4": "--tp 2",
    "--kt-num-gpu-experts 96": "--kt-num-gpu-experts 3",
    "--kt-cpuinfer 64": "--kt-cpuinfer 2",
    "--gpu-experts 96": "--gpu-experts 4",
    "--cpu-threads 64": "--cpu-threads 2",
    "--max-total-tokens 131072": "--max-total-tokens 20000",
}
"""The parts of a documented command that are replaced before it is run, with their replacements. The programs are those
of the tests' own environment; a test appends what else it needs, such as its port and `--device cpu`."""

RUN_BY = {
    "python3 -m pip install nox && python3 -m nox -f ci/noxfile.py": (".ci/run", "README.md"),
    "python3 -m pip install nox && python3 -m nox -f ci/noxfile.py -s demo": ("ci/noxfile.py", '_demo(session, "vllm")'),
    VLLM: ("tests/vllm/test_deployments.py", "documented.VLLM"),
    SGLANG: ("tests/sglang/test_deployments.py", "documented.SGLANG"),
    HYBRID: ("tests/sglang/hybrid/test_served.py", "documented.HYBRID"),
    KT_RUN: ("tests/sglang/hybrid/test_served.py", "documented.KT_RUN"),
    SERVE_VLLM: ("tests/vllm/test_operate.py", "documented.SERVE_VLLM"),
    SERVE_SGLANG: ("tests/sglang/conftest.py", "documented.SERVE_SGLANG"),
    LORA_VLLM: ("tests/vllm/test_lora.py", "documented.LORA_VLLM"),
    EAGLE3_VLLM: ("tests/vllm/test_speculation.py", "documented.EAGLE3_VLLM"),
    PLAIN_VLLM: ("tests/support/vllm_server.py", "documented.PLAIN_VLLM"),
    PLAIN_SGLANG: ("tests/support/sglang_server.py", "documented.PLAIN_SGLANG"),
    'PYTHONPATH="$(python -m k26_plugins.sglang.boot)" python -m sglang.launch_server …': (
        "tests/support/sglang_server.py", '"k26_plugins.sglang.boot"',
    ),
    # CI installs the checkout as long as no index has the package.
    "pip install k26-plugins": ("ci/noxfile.py", '"-e", "."'),
}  # fmt: skip
"""For each command the file that runs it, and the text in that file by which it does so."""

NOT_RUN = {
    "pip install 'k26-plugins[vllm]'": "the extra brings vLLM's CUDA build; the environments install its CPU build first",
    "pip install 'k26-plugins[sglang]'": "no index has the package yet; ci/install_sglang.py installs SGLang first",
    **dict.fromkeys(
        ("k26 tune --tp 8", "k26 tune --ep 8 --quick --for decode"),
        "needs a GPU; tests/kernels/test_bench.py runs it with the interpreter in the GPU's place",
    ),
}
"""For each command that CI does not run, the reason."""

_COMMAND = re.compile(r"(\w+=\S+ )*(\w+=\"[^\"]*\" )*(k26|kt|pip|python3?|vllm) .+")


def lines(page: Path) -> list[str]:
    """Return the lines of a page's code blocks, with continued lines joined and without the comment after a command."""
    text = page.read_text(encoding="utf-8")
    # A code block begins after an empty line; indented lines without one before them continue an item of a list.
    blocks = re.findall(r"(?:^|\n)\n((?: {4}.*\n)+)", text)
    joined = re.sub(r" *\\\n *", " ", "".join(blocks))
    return [re.sub(r"\s+# .*", "", line).strip() for line in joined.splitlines()]


def commands(page: Path) -> list[str]:
    """Return the commands among the lines of a page's code blocks."""
    return [line for line in lines(page) if _COMMAND.fullmatch(line)]


def as_run(command: str, folder: Path) -> list[str]:
    """Return a documented command's words, to be run on the checkpoint in `folder` with this environment's programs.

    The replacements of SUBSTITUTED are made first. Raises AssertionError if no page has the command.
    """
    assert any(command in commands(page) for page in PAGES), f"no page says {command!r}: mend support/documented.py"
    for written, run in SUBSTITUTED.items():
        command = re.sub(rf"(?<!\S){re.escape(written)}(?!\S)", run, command)
    program, *arguments = [str(folder) if word == "DIR" else word for word in shlex.split(command)]
    found = sys.executable if program == "python" else str(Path(sys.executable).with_name(program))
    return [found, *arguments]
