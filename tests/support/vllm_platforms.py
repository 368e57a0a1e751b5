"""What vLLM makes of flags on a GPU that this machine has not, or on a CPU: run by tests/vllm/test_platforms.py.

    python -m support.vllm_platforms FOLDER DRAFT PLATFORM[,PLATFORM...] [FLAGS]

For each platform, each set of flags and each way to run, vLLM's configuration is settled and the model built in a process of
its own, with tensors that have a device and a shape and nothing else. Prints a line of JSON for each.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any
from unittest import mock

import torch
from support.platforms import VLLM_FLAGS
from support.pretended_gpu import GPUS, Machine
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from k26_plugins import __version__

WAYS = {
    "alone": {"VLLM_PLUGINS": ""},
    "plugin": {"VLLM_PLUGINS": "k26"},
    "triton": {"VLLM_PLUGINS": "k26", "K26_EXPERTS": "triton"},
}
"""The environment by the way's name. The way without the plugin comes first, since what the plugin changes stays
changed."""


KERNEL_FLAGS = ("none", "TP", "EP", "DeepEP high throughput", "DeepEP low latency", "EPLB", "encoder only")
"""The flags by which the answer of the core's kernels may differ."""


class WithoutWeights(TorchFunctionMode):
    """Weights are made without memory, and small tables with values on the CPU, whatever device is asked for.

    The default device is still said to be the GPU.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        # vLLM makes on it itself what is never loaded.
        if function in _device_constructors() and str(kwargs.get("device")) != "meta":
            kwargs["device"] = "meta" if function is torch.empty else "cpu"
        if function is torch.Tensor.to:
            return args[0]
        return function(*args, **kwargs)


@contextmanager
def ranks(config: Any) -> Iterator[None]:
    """vLLM's groups of all the ranks that the flags ask for, seen from the first; nobody is there to talk to."""
    import torch.distributed as dist
    import vllm.distributed.parallel_state as state
    from torch.distributed import distributed_c10d
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
    from vllm.platforms import current_platform

    # Its import makes the backend "fake" known.
    importlib.import_module("torch.testing._internal.distributed.fake_pg")
    parallel, new_group = config.parallel_config, dist.new_group
    communicator = "vllm.distributed.device_communicators.base_device_communicator.DeviceCommunicatorBase"
    with ExitStack() as stack:
        for owner, name, replacement in (
            (dist, "new_group", lambda members=None, **options: new_group(members, backend="fake")),
            (state, "_node_count", lambda group: 1),
            (MessageQueue, "create_from_process_group", lambda *args, **kwargs: None),
            (type(current_platform), "get_device_communicator_cls", classmethod(lambda platform: communicator)),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        stores: Any = dist  # which does not say in `__all__` that it has them
        size = parallel.world_size_across_dp
        dist.init_process_group("fake", store=stores.HashStore(), rank=0, world_size=size)
        # What the plugin of each of the other ranks says there.
        store = stores.PrefixStore("k26-plugins/1", distributed_c10d._get_default_store())
        for rank in range(1, size):
            store.set(str(rank), f"{__version__} of another rank")
        state.init_distributed_environment(size, 0, "fake://", 0, "fake")
        state.initialize_model_parallel(
            parallel.tensor_parallel_size,
            parallel.pipeline_parallel_size,
            parallel.prefill_context_parallel_size,
            parallel.decode_context_parallel_size,
            backend="fake",
        )
        yield


def build(config: Any) -> torch.nn.Module:
    """The model, as a worker of the first rank builds it before its weights are loaded."""
    from vllm.config import CompilationMode, set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.platforms import current_platform
    from vllm.utils.torch_utils import set_default_torch_dtype

    # Compiling needs the operators, and chooses none of what is asked here.
    config.compilation_config.mode = CompilationMode.NONE
    with (
        set_current_vllm_config(config),
        ranks(config),
        set_default_torch_dtype(config.model_config.dtype),
        # Where the device has no number, torch makes a tensor to find out.
        torch.device(current_platform.device_type, 0),
        WithoutWeights(),
        mock.patch.object(torch.nn.Module, "to", lambda module, *args, **kwargs: module),
    ):
        return initialize_model(config)


def described(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every field of a configuration and of those in it, by its path: without what is another in each process."""
    if hasattr(value, "to_dict"):
        parts = value.to_dict()
    elif dataclasses.is_dataclass(value):
        parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif isinstance(value, dict):
        parts = value
    else:
        if not re.search("port|instance_id", name):
            yield name, re.sub(" at 0x[0-9a-f]+", "", repr(value))
        return
    for key, part in parts.items():
        yield from described(part, f"{name}.{key}".lstrip("."))


def chosen(model: torch.nn.Module) -> dict[str, Any]:
    """Which classes compute, by the kind of layer; and the class of every module."""
    found: dict[str, Any] = {"model": type(model).__module__, "modules": {}}
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        found["modules"][name] = f"{type(module).__name__} {type(method).__name__}"
        if hasattr(module, "moe_config") and method is not None:
            experts = getattr(method, "experts_cls", None)
            found["experts"] = experts.__name__ if experts else f"{type(method).__name__} {method.backend_name}"
        backend = getattr(module, "attn_backend", None)
        if backend is not None:
            kind = "attention" if hasattr(module, "prefill_backend") else "vision attention"
            found[kind] = backend.get_name() if hasattr(backend, "get_name") else backend.name
            if kind == "attention" and module.prefill_backend is not None:
                found["prefill"] = module.prefill_backend.get_name()
    return found


def answer(arguments: Any) -> dict[str, Any]:
    """What vLLM would run, or the words with which it refuses."""
    from vllm.engine.arg_utils import EngineArgs

    try:
        config = EngineArgs.from_cli_args(arguments).create_engine_config()
        settled = dict(described(config))
        return {"settled": settled, **chosen(build(config))}
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {error}"}


def in_a_process(work: Callable[[], Any]) -> Any:
    """What `work` returns, of a fork of this process: what it changes and what it caches is gone with it."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        with os.fdopen(writer, "w") as pipe:
            json.dump(work(), pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text)


def prepared(platform: str) -> Machine | None:
    """The pretence of a platform's kind, with vLLM's modules imported, as far as starting a model imports them."""
    machine = Machine(GPUS[platform]) if platform in GPUS else None
    registry: Any = importlib.import_module("vllm.model_executor.models.registry")
    importlib.import_module("vllm.model_executor.models.kimi_k25")

    # A process of its own would know nothing of the pretence.
    registry._run_in_subprocess = lambda function: function()
    torch.cpu._is_amx_tile_supported = lambda: False
    return machine


def main(folder: str, draft: str, platforms: list[str], flags: list[str]) -> None:
    machine = prepared(platforms[0])
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())

    def ask(platform: str, name: str, way: str) -> dict[str, Any]:
        words = VLLM_FLAGS[name].replace("DRAFT", draft).split()
        # Variables stand before the flags, as before a command in a shell.
        variables = dict(word.split("=") for word in words if word.startswith("VLLM_"))
        os.environ.update(WAYS[way] | variables)
        if machine is not None:
            machine.become(GPUS[platform])
        return answer(parser.parse_args(["--model", folder, *words[len(variables) :]]))

    def scout() -> list[str]:
        ask(platforms[0], "none", "plugin")
        return [name for name in sys.modules if name.startswith(("vllm.", "transformers.", "torch."))]

    for module in in_a_process(scout):
        with suppress(Exception):
            importlib.import_module(module)
    # What was collected once stays as it is in every fork.
    gc.freeze()
    gc.disable()
    for platform in platforms:
        for name in flags:
            for way in WAYS if name in KERNEL_FLAGS else ("alone", "plugin"):
                found = in_a_process(partial(ask, platform, name, way))
                print(json.dumps({"platform": platform, "flags": name, "way": way, **found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3].split(","), sys.argv[4:] or list(VLLM_FLAGS))
