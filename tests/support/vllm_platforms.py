"""Prints what vLLM chooses for sets of flags on GPUs that this machine does not have, or on a CPU.

tests/vllm/test_platforms.py runs it:

    python -m support.vllm_platforms FOLDER DRAFT PLATFORM[,PLATFORM...] [FLAGS]

For each platform, each set of flags and each way to run, vLLM settles its configuration and builds the model in a
separate process, with tensors that have a device and a shape but no memory. A line of JSON is printed for each.
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
"""The environment variables of each way to run: without the plugin, with it, and with the core's Triton kernels."""


KERNEL_FLAGS = ("none", "TP", "EP", "DeepEP high throughput", "DeepEP low latency", "EPLB", "encoder only")
"""The names, in VLLM_FLAGS, of the flags with which `triton` is tried, since the core's kernels may differ there."""


class WithoutWeights(TorchFunctionMode):
    """A mode that makes weights without memory, and small tables with values on the CPU, whatever device is asked for.

    The default device that vLLM sees is still the GPU.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        # vLLM itself uses the device "meta" for tensors that are never loaded; those stay there.
        if function in _device_constructors() and str(kwargs.get("device")) != "meta":
            kwargs["device"] = "meta" if function is torch.empty else "cpu"
        if function is torch.Tensor.to:
            return args[0]
        return function(*args, **kwargs)


@contextmanager
def ranks(config: Any) -> Iterator[None]:
    """Make vLLM's process groups for all ranks that the flags ask for, as rank 0, although no other rank exists."""
    import torch.distributed as dist
    import vllm.distributed.parallel_state as state
    from torch.distributed import distributed_c10d
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
    from vllm.platforms import current_platform

    # The import registers torch's backend "fake".
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
        stores: Any = dist  # typed as Any, because `__all__` does not list the stores
        size = parallel.world_size_across_dp
        dist.init_process_group("fake", store=stores.HashStore(), rank=0, world_size=size)
        # The plugin on each of the other ranks would leave its version in the store (`common/adapters/ranks.py`).
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
    """Return the model as the worker of rank 0 builds it, before its weights are loaded."""
    from vllm.config import CompilationMode, set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.platforms import current_platform
    from vllm.utils.torch_utils import set_default_torch_dtype

    # Compiling would need the GPU's operators, and has no part in what is compared here.
    config.compilation_config.mode = CompilationMode.NONE
    with (
        set_current_vllm_config(config),
        ranks(config),
        set_default_torch_dtype(config.model_config.dtype),
        # With an index, torch need not make a tensor to find out the current device.
        torch.device(current_platform.device_type, 0),
        WithoutWeights(),
        mock.patch.object(torch.nn.Module, "to", lambda module, *args, **kwargs: module),
    ):
        return initialize_model(config)


def described(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield the path and the value of every field of a configuration and of those inside it.

    Fields that differ in every process, such as ports, are left out.
    """
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
    """Return the names of the classes that compute experts and attention, and of each module's class and its method."""
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
    """Return the configuration and the classes with which vLLM would run, or the error with which it refuses."""
    from vllm.engine.arg_utils import EngineArgs

    try:
        config = EngineArgs.from_cli_args(arguments).create_engine_config()
        settled = dict(described(config))
        return {"settled": settled, **chosen(build(config))}
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {error}"}


def in_a_process(work: Callable[[], Any]) -> Any:
    """Return what `work` returns in a fork of this process, so that nothing that it changes or caches stays.

    The result must be JSON.
    """
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
    """Pretend the platform and import the vLLM modules that starting a model imports. Returns None for the CPU."""
    machine = Machine(GPUS[platform]) if platform in GPUS else None
    registry: Any = importlib.import_module("vllm.model_executor.models.registry")
    importlib.import_module("vllm.model_executor.models.kimi_k25")

    # vLLM inspects a model's class in a subprocess, which would know nothing of the pretended machine.
    registry._run_in_subprocess = lambda function: function()
    torch.cpu._is_amx_tile_supported = lambda: False
    return machine


def main(folder: str, draft: str, platforms: list[str], flags: list[str]) -> None:
    """Print vLLM's answers for the checkpoint in `folder`.

    platforms: those to try, all of one kind. flags: names in VLLM_FLAGS.
    """
    machine = prepared(platforms[0])
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())

    def ask(platform: str, name: str, way: str) -> dict[str, Any]:
        words = VLLM_FLAGS[name].replace("DRAFT", draft).split()
        # As in a shell, variables come before the flags.
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
    # Without garbage collection the forks share this process's memory instead of copying it.
    gc.freeze()
    gc.disable()
    for platform in platforms:
        for name in flags:
            for way in WAYS if name in KERNEL_FLAGS else ("alone", "plugin"):
                found = in_a_process(partial(ask, platform, name, way))
                print(json.dumps({"platform": platform, "flags": name, "way": way, **found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3].split(","), sys.argv[4:] or list(VLLM_FLAGS))
