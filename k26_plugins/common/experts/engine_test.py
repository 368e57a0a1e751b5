"""Test the engine's own experts before they serve: a few experts of some layers, computed by the engine's own method.

The weights are taken from the layer's parameters once they are loaded, just before the method rearranges them for its
kernel; so they are this rank's weights, sharded or not. The kernel's result is compared with a plain GEMM with them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from k26_plugins.common.experts.base import Expert, ExpertsError
from k26_plugins.common.experts.reference import dense_matrices, routed_sum
from k26_plugins.common.experts.selftest import RoutedSum, worst_error
from k26_plugins.common.experts.triton import TritonExperts
from k26_plugins.common.model.int4 import GROUP_SIZE, PACK_FACTOR
from k26_plugins.common.settings import ENGINE, EXPERTS

BATCHES = (1, 8, 64, 400)
"""Numbers of tokens in the first layer's batches, one for each regime that the engines' kernels have."""
FURTHER_BATCHES = (1, 64)
"""Numbers of tokens for the other layers, which differ from the first one only in their weights."""
LIMIT = 5e-2
"""Limit on the relative error: above that of activations in 8 bits (1.2e-2), which some kernels use, and far below what
a wrong kernel gives (above 0.5)."""

files_read: list[str] = []
"""Files that the engine's loader has read for the model that this process built last; only it knows where they are."""

Matrices = Callable[[int], tuple[torch.Tensor, torch.Tensor]]


class UntestableError(Exception):
    """Raised for experts that the test does not know how to test. The message says why."""


class EngineLayer(NamedTuple):
    """A layer that an engine's own method computes, with what the test needs to know about it."""

    module: torch.nn.Module
    """The module whose parameters are loaded."""
    method: Any
    """The object whose `process_weights_after_loading(module)` the engine calls once the parameters are loaded."""
    kernel: Callable[[], str]
    """Returns the kernel's name, for the log."""
    top_k: int
    global_ids: Callable[[list[int]], list[int]]
    """Returns the ids by which the method knows some of this rank's experts, given by their local indices."""
    computed: RoutedSum
    """Computes this rank's routed sum with the method. Raises UntestableError."""
    scales: tuple[float, ...] = (1.0,)
    """Factors, by one of which the method multiplies the sum."""


def some_layers(numbers: Sequence[int]) -> list[int]:
    """Return which of a model's layers with experts are tested: the first, one in the middle and the last."""
    ordered = sorted(numbers)
    return sorted({ordered[0], ordered[len(ordered) // 2], ordered[-1]}) if ordered else []


def raw_experts(module: torch.nn.Module, chosen: list[int]) -> Matrices:
    """Copy some of a module's experts as an engine has loaded them, and return a function that gives them as matrices.

    chosen: local indices. The function takes an index into `chosen` and returns that expert's w13 `[2 I, H]` and w2
    `[H, I]` in float32. Raises UntestableError if the parameters are neither this model's INT4 ones nor dense ones.
    """
    parameters = {name: tensor.data for name, tensor in module.named_parameters(recurse=False)}
    if any(name.endswith(("zero_point", "bias")) for name in parameters):
        raise UntestableError("its experts have zero points or biases")
    if "w13_weight_packed" in parameters:
        tensors = [
            parameters[f"{matrix}_weight_{part}"][chosen] for matrix in ("w13", "w2") for part in ("packed", "scale")
        ]
        if tensors[0].shape[1] * PACK_FACTOR == tensors[2].shape[2]:
            # Some methods have their parameters loaded with K before N.
            tensors = [tensor.transpose(1, 2) for tensor in tensors]
        packed = [Expert(*(tensor[place].contiguous() for tensor in tensors)) for place in range(len(chosen))]
        hidden_size, words = packed[0].w2_packed.shape
        intermediate_size = words * PACK_FACTOR
        shapes = (
            (2 * intermediate_size, hidden_size // PACK_FACTOR),
            (2 * intermediate_size, hidden_size // GROUP_SIZE),
            (hidden_size, intermediate_size // PACK_FACTOR),
            (hidden_size, intermediate_size // GROUP_SIZE),
        )
        if tuple(tuple(tensor.shape) for tensor in packed[0]) != shapes:
            raise UntestableError(f"its packed experts have shapes {[list(tensor.shape) for tensor in packed[0]]}")
        return lambda place: dense_matrices(packed[place], torch.float32)
    try:
        w13, w2 = parameters["w13_weight"][chosen], parameters["w2_weight"][chosen]
    except KeyError:
        raise UntestableError(f"its parameters are {', '.join(sorted(parameters)) or 'none'}") from None
    if not w13.is_floating_point() or w13.element_size() < 2 or w13.shape[1:] != (2 * w2.shape[2], w2.shape[1]):
        raise UntestableError(f"its experts are {w13.dtype} {list(w13.shape)} and {w2.dtype} {list(w2.shape)}")
    return lambda place: (w13[place].float(), w2[place].float())


@dataclass(slots=True)
class EngineTest:
    """The test of one model's layers in an engine, each as soon as the engine has made the layer ready.

    on_wrong: called at the first layer whose result is wrong, once, with a text that says what is wrong.
    """

    engine: str
    logger: logging.Logger
    on_wrong: Callable[[str], None]
    tested: int = 0
    worst: float = 0.0
    seconds: float = 0.0
    extra_bytes: int = 0
    """Peak of the device memory that the test took; 0 on a CPU, whose memory torch does not count."""
    _left: int = 0
    _over: bool = False
    _said: set[str] = field(default_factory=set)

    def watch(self, layers: Sequence[EngineLayer]) -> None:
        """Have these layers tested, given in the order in which the engine makes them ready."""
        self._left = len(layers)
        for place, layer in enumerate(layers):
            self._watch(layer, FURTHER_BATCHES if place else BATCHES)

    def _watch(self, layer: EngineLayer, batches: Sequence[int]) -> None:
        original = layer.method.process_weights_after_loading

        def process(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self._over or module is not layer.module:
                return original(module, *args, **kwargs)
            # Unhook the method, so that the layer is tested at the start and not again at an update of the weights.
            del layer.method.process_weights_after_loading
            device = next(module.parameters(recurse=False)).device
            with self._measured(device, 0):
                before = _allocated(device)
                raw = self._attempt(layer, lambda: self._prepare(layer))
                held = _allocated(device) - before
            result = original(module, *args, **kwargs)
            with self._measured(device, held):
                error = None if raw is None else self._attempt(layer, lambda: self._error(layer, batches, *raw))
            self._left -= 1
            self._judge(layer, error)
            return result

        layer.method.process_weights_after_loading = process

    @contextmanager
    def _measured(self, device: torch.device, held: int) -> Iterator[None]:
        """Count the body's time and peak memory as the test's. held: bytes that the test already has on the device."""
        before = _allocated(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        begin = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - begin
        if device.type == "cuda":
            self.extra_bytes = max(self.extra_bytes, held + torch.cuda.max_memory_allocated(device) - before)

    def _attempt(self, layer: EngineLayer, what: Callable[[], Any]) -> Any:
        """Return the result of `what`; if it raises, log why and return None, so that the start goes on."""
        try:
            with torch.no_grad():
                return what()
        except UntestableError as reason:
            said = str(reason)
        except Exception as error:  # whatever a method makes of a call that it does not expect
            said = f"{type(error).__name__}: {error}"
        if said not in self._said:
            self._said.add(said)
            self.logger.warning(
                "k26-plugins: %s's own experts (%s) serve untested: %s.", self.engine, layer.kernel(), said.rstrip(".")
            )
        return None

    def _prepare(self, layer: EngineLayer) -> tuple[Matrices, list[int], torch.device, torch.dtype]:
        """Copy evenly spaced experts of this rank, as many as a token chooses.

        Returns their matrices, their local indices, the device, and the dtype of the hidden states.
        """
        first = next(layer.module.parameters(recurse=False))
        num_experts = first.shape[0]
        count = min(layer.top_k, num_experts)
        chosen = sorted({place * (num_experts - 1) // max(count - 1, 1) for place in range(count)})
        matrices = raw_experts(layer.module, chosen)
        scale = getattr(layer.module, "w13_weight_scale", None)
        dtype = first.dtype if scale is None else scale.dtype
        return matrices, chosen, first.device, dtype

    def _error(
        self,
        layer: EngineLayer,
        batches: Sequence[int],
        matrices: Matrices,
        chosen: list[int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> float:
        ids = torch.tensor(layer.global_ids(chosen), dtype=torch.int32, device=device)
        places = torch.arange(len(chosen), dtype=torch.int32, device=device)

        def expected(hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
            here = places.expand(topk_ids.shape)
            return routed_sum(hidden_states.float(), here, topk_weights, matrices, len(chosen))

        return worst_error(layer.computed, expected, ids, matrices(0)[1].shape[0], batches, dtype, layer.scales)

    def _judge(self, layer: EngineLayer, error: float | None) -> None:
        if error is not None:
            self.tested += 1
            self.worst = max(self.worst, error)
        device = next(layer.module.parameters(recurse=False)).device
        if error is not None and not error <= LIMIT:
            self._over = True
            self.on_wrong(
                f"{self.engine}'s own experts ({layer.kernel()}) are wrong on {_name(device)}: relative error {error:.3g} "
                f"(limit {LIMIT:g})"
            )
        elif self._left == 0 and self.tested:
            self.logger.info(
                "k26-plugins: %s's own experts (%s) passed the test on %s: relative error %.2g, %d layers, %.2f s%s.",
                self.engine,
                layer.kernel(),
                _name(device),
                self.worst,
                self.tested,
                self.seconds,
                f", {self.extra_bytes / 1e6:.0f} MB for that time" if self.extra_bytes else "",
            )


def note_files(files: Iterable[str]) -> None:
    """Add files to `files_read`, each only once, because an update reads the same files again."""
    files_read.extend(file for file in files if file not in files_read)


def watch_layers(
    engine: str,
    logger: logging.Logger,
    layers: Mapping[int, Callable[[], EngineLayer]],
    on_wrong: Callable[[str], None],
) -> None:
    """Have some layers of a new model tested that the engine's own experts compute.

    layers: for each layer's number a function that gives the layer. on_wrong: as in `EngineTest`.
    """
    files_read.clear()
    EngineTest(engine, logger, on_wrong).watch([layers[number]() for number in some_layers(list(layers))])


def require_replaceable(wrong: str, engine: str, *, published_layout: bool) -> None:
    """Raise ExpertsError if the core's experts cannot take the place of an engine's wrong ones.

    wrong: what the test found. published_layout: whether the checkpoint has the published INT4 weights.
    """
    if not published_layout:
        stop(wrong, "they are for the published INT4 weights")
    if EXPERTS.read() == ENGINE:
        stop(wrong, f"{EXPERTS.variable}={ENGINE} asks for {engine}'s. Unset it")
    if not files_read:
        way = "the way in which the weights are loaded gives them once"
        stop(wrong, f"{way}. Set {EXPERTS.variable}={TritonExperts.name}")


def stop(wrong: str, why_not: str) -> None:
    """Raise ExpertsError, because neither the engine's experts nor the core's may serve."""
    raise ExpertsError(f"{wrong}, and the core's cannot take their place: {why_not}. Serving would give garbage.")


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
