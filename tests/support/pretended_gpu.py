"""Pretends to vLLM in this process that the machine has a GPU: its driver's answers, and the modules of a build for it.

Only questions are answered, and vLLM's own classes of platforms draw their conclusions as they do from a real driver's
answers. Nothing is computed: the modules that a build for GPUs brings exist by name only.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch

GIB = 2**30
BROUGHT = (
    # vLLM's builds for CUDA or ROCm bring these as compiled modules.
    "vllm._C", "vllm._C_stable_libtorch", "vllm._moe_C_stable_libtorch", "vllm._rocm_C", "vllm._flashmla_C",
    "vllm._flashmla_extension_C", "vllm.cumem_allocator", "vllm.third_party.flashmla",
    "vllm.vllm_flash_attn._vllm_fa2_C", "vllm.vllm_flash_attn._vllm_fa3_C",
)  # fmt: skip
REQUIRED = {
    "cuda": ("flashinfer", "flashinfer_cubin", "humming", "tokenspeed_mla", "deep_ep"),
    "rocm": ("amdsmi", "flash_attn", "deep_ep"),
}
"""The packages that vLLM's builds require beside the compiled modules, and DeepEP, which some flags need."""
OPERATORS = ("_C", "_moe_C", "_rocm_C", "_C_cache_ops")


class Gpu(NamedTuple):
    """A GPU as its driver describes it."""

    kind: str
    """`cuda` or `rocm`."""
    capability: tuple[int, int]
    architecture: str
    """The architecture's name in AMD's driver; empty for NVIDIA's GPUs."""


GPUS = {
    "sm_80": Gpu("cuda", (8, 0), ""),
    "sm_89": Gpu("cuda", (8, 9), ""),
    "sm_90": Gpu("cuda", (9, 0), ""),
    "sm_100": Gpu("cuda", (10, 0), ""),
    "sm_103": Gpu("cuda", (10, 3), ""),
    "sm_120": Gpu("cuda", (12, 0), ""),
    "sm_121": Gpu("cuda", (12, 1), ""),
    "gfx942": Gpu("rocm", (9, 4), "gfx942"),
    "gfx950": Gpu("rocm", (9, 5), "gfx950"),
}
COUNT = 8


class _Named(type):
    """The metaclass of classes that have every attribute that they are asked for."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)

        def member(*args: Any, **kwargs: Any) -> None:
            pass

        # The attribute may be taken for a member of an enumeration, which has a `value`.
        member.value = name  # type: ignore[attr-defined]
        return member


class _Package(ModuleType):
    __version__ = "99"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Named(name, (), {"__init__": lambda self, *args, **kwargs: None})


class _Packages(MetaPathFinder, Loader):
    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if any(name == one or name.startswith(f"{one}.") for one in self.names):
            return ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Package(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class Machine:
    """A machine of eight GPUs that vLLM believes in. It must be made before anything of vLLM is imported.

    `become` later changes its GPUs to others of the same kind.
    """

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self._imported = False
        sys.meta_path.insert(0, _Packages((*BROUGHT, *REQUIRED[gpu.kind])))
        self._torch()
        self._operators()
        import vllm.platforms

        # The installed build's version says that the build is for CPUs.
        vllm.platforms.vllm_version_matches_substr = lambda part: False
        self._nvml() if gpu.kind == "cuda" else self._amdsmi()
        self._triton()
        platform = importlib.import_module(f"vllm.platforms.{gpu.kind}")
        setattr(platform, f"_{gpu.kind}_device_count_stateless", lambda devices=None: COUNT)
        assert getattr(vllm.platforms.current_platform, f"is_{gpu.kind}")(), (
            "vLLM does not take it for what it says it is"
        )

    def become(self, gpu: Gpu) -> None:
        """Change the machine's GPUs to `gpu`, which must be of the same kind.

        To be called when all of vLLM's modules are imported: from then on all operators of vLLM's builds exist.
        """
        import vllm.platforms

        assert gpu.kind == self.gpu.kind
        self.gpu = gpu
        self._imported = True
        name = f"vllm.platforms.{gpu.kind}"
        # Other modules hold the one platform object, so that object gets the class of the reloaded module, whose
        # functions read the driver's answers anew.
        module = importlib.reload(sys.modules[name])
        setattr(module, f"_{gpu.kind}_device_count_stateless", lambda devices=None: COUNT)
        class_name = type(vllm.platforms.current_platform).__name__
        vllm.platforms.current_platform.__class__ = getattr(module, class_name)
        assert tuple(vllm.platforms.current_platform.get_device_capability()) == gpu.capability

    def _torch(self) -> None:
        torch.version.hip = "7.0" if self.gpu.kind == "rocm" else None
        torch.version.cuda = "13.0" if self.gpu.kind == "cuda" else None
        # Typed as Any, because its members are replaced by others of other types.
        cuda: Any = torch.cuda
        cuda.is_available = lambda: True
        cuda.device_count = lambda: COUNT
        cuda.current_device = lambda: torch.device("cuda:0")
        cuda.get_device_capability = lambda device=None: self.gpu.capability
        cuda.get_device_properties = lambda device=None: SimpleNamespace(
            name="pretended", major=self.gpu.capability[0], minor=self.gpu.capability[1], total_memory=140 * GIB,
            gcnArchName=self.gpu.architecture, multi_processor_count=128, is_integrated=False,
        )  # fmt: skip
        cuda.Stream = cuda.Event = _Named("Stream", (), {"__init__": lambda self, *args, **kwargs: None})

    def _operators(self) -> None:
        """Pretend the operators of vLLM's builds.

        While vLLM is imported, only the operators that say what a GPU supports exist, and they say FP8 and FP4.
        """
        namespace: Any = type(torch.ops._C)
        real = namespace.__getattr__

        def operator(operators: Any, name: str) -> Any:
            try:
                return real(operators, name)
            except AttributeError:
                if operators.name not in OPERATORS or not (self._imported or "supports" in name):
                    raise
                return _Named(name, (), {"__new__": lambda cls, *args, **kwargs: None})

        namespace.__getattr__ = operator

    def _nvml(self) -> None:
        import vllm.third_party.pynvml as nvml

        nvml.nvmlInit = nvml.nvmlShutdown = lambda: None
        nvml.nvmlDeviceGetCount = lambda: COUNT
        nvml.nvmlDeviceGetHandleByIndex = lambda index: index
        nvml.nvmlDeviceGetCudaComputeCapability = lambda handle: self.gpu.capability
        nvml.nvmlDeviceGetName = lambda handle: "pretended"
        nvml.nvmlDeviceGetMemoryInfo = lambda handle: SimpleNamespace(total=140 * GIB)

    def _amdsmi(self) -> None:
        import amdsmi

        amdsmi.AmdSmiException = RuntimeError
        amdsmi.amdsmi_init = amdsmi.amdsmi_shut_down = lambda: None
        amdsmi.amdsmi_get_processor_handles = lambda: list(range(COUNT))
        amdsmi.amdsmi_get_gpu_asic_info = lambda handle: {
            "target_graphics_version": self.gpu.architecture, "device_id": "0x0", "market_name": "pretended",
        }  # fmt: skip
        amdsmi.amdsmi_get_gpu_memory_total = lambda handle, kind: 140 * GIB

    def _triton(self) -> None:
        from triton.backends import backends

        ours = "nvidia" if self.gpu.kind == "cuda" else "amd"
        for name, backend in backends.items():
            active = name == ours
            backend.driver.is_active = staticmethod(lambda active=active: active)
