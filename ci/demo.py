"""Make the tiny checkpoint, serve it with an engine's own command, and answer a text and an image request.

    python ci/demo.py vllm FOLDER
    python ci/demo.py sglang FOLDER
    python ci/demo.py hybrid FOLDER      SGLang, half of the experts in the host's memory

The model's weights are random, so the answers are noise. The demonstration shows that every part of serving works.
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import sys
from pathlib import Path

from PIL import Image

import k26_plugins
from k26_plugins.common.tiny.checkpoint import make_tiny

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.images import image_part, png
from support.server import said


def arguments_of(run: str, checkpoint: Path) -> tuple[str, list[str]]:
    """Return the engine of a run, and the arguments of its command besides the checkpoint."""
    if run == "vllm":
        return run, ["--enforce-eager"]  # compiling would take longer than the two answers
    if run == "hybrid":
        return "sglang", ["--kt-weight-path", str(checkpoint), "--kt-num-gpu-experts", "4"]
    return run, []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", choices=("vllm", "sglang", "hybrid"))
    parser.add_argument("folder", type=Path, help="where the checkpoint `tiny` and the server's log go")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, log = folder / "tiny", folder / "server.log"
    shutil.rmtree(checkpoint, ignore_errors=True)
    make_tiny(checkpoint)
    engine, more = arguments_of(arguments.run, checkpoint)
    print(f"k26-plugins in {Path(k26_plugins.__file__).parent}")
    print(f"made {checkpoint}; starting {engine} {' '.join(more)}, log in {log} …", flush=True)
    serve = importlib.import_module(f"support.{engine}_server").serve
    with serve(checkpoint, log, *more) as server:
        print(f"ready at {server.url}")
        picture = image_part(png(Image.new("RGB", (100, 80), (200, 30, 90))))
        questions = {"text": "Hello", "image": [picture, {"type": "text", "text": "What is this?"}]}
        for name, content in questions.items():
            answer = server.chat(content, max_tokens=16, temperature=0)
            usage = answer["usage"]
            print(f"{name}: {usage['prompt_tokens']} prompt tokens, {usage['completion_tokens']} answered:")
            print(f"  {said(answer['choices'][0]['message'])!r}")


if __name__ == "__main__":
    main()
