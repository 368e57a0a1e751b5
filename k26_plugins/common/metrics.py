"""Report what the core measures on the engines' Prometheus endpoint, under names that begin with `k26_`.

The experts are loaded in worker processes, while the endpoint belongs to the API server. Where the engine runs
prometheus_client in its multiprocess mode (SGLang with --enable-metrics, vLLM with several API servers), that mode
carries the figures over. In vLLM with one API server, each worker writes its figures to a small file, and a collector
in the API server reads these files at every scrape.
"""

from __future__ import annotations

import atexit
import functools
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

_MULTIPROCESS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_EXPERTS = {
    "layers": "k26_experts_layers",
    "self_test_error": "k26_experts_self_test_error",
    "self_test_seconds": "k26_experts_self_test_seconds",
}
_HELP = {
    "layers": "MoE layers whose INT4 experts the core computes, by backend and rank.",
    "self_test_error": "Worst relative error of the experts' self-test with the model's weights.",
    "self_test_seconds": "Seconds that the self-tests took at load.",
}


@dataclass
class _Experts:
    """The figures of one experts backend in this process."""

    layers: int = 0
    self_test_error: float = 0.0
    self_test_seconds: float = 0.0


_loaded: dict[str, _Experts] = {}
# Where this process writes its figures; None if they go another way, or nowhere.
_folder: Path | None = None
_CHOICE = "k26_experts_choice"
_CHOICE_HELP = "1 for the INT4 experts that `auto` took on a GPU, the core's or the engine's own, and why, by rank."
_chosen: dict[str, str] = {}
_HIT_RATE = "k26_hybrid_hit_rate"
_HIT_RATE_HELP = "Share of the routed experts' uses that a hybrid run's device computed lately, by rank."


def experts_chosen(whose: str, why: str) -> None:
    """Report which experts `K26_EXPERTS=auto` chose for all layers in this process.

    whose: the core backend's name, or `engine` for the engine's own experts. why: the reason; both become labels.
    """
    _chosen[whose] = why
    _report([(_CHOICE, _CHOICE_HELP, {"experts": whose, "why": why}, 1)])


def hybrid_hit_rate(share: float) -> None:
    """Report the share (0 to 1) of the routed experts' uses that a hybrid run computed on the device.

    Only SGLang has hybrid runs, and prometheus_client's multiprocess mode carries the figure over there.
    """
    _report([(_HIT_RATE, _HIT_RATE_HELP, {}, share)])


def experts_loaded(backend: str, self_test_error: float, self_test_seconds: float, *, update: bool = False) -> None:
    """Report that the experts of one layer passed their self-test and are in place.

    self_test_error: relative error. update: the weights replace those of a layer that was already counted.
    """
    found = _loaded.setdefault(backend, _Experts())
    found.layers += not update
    found.self_test_error = max(found.self_test_error, self_test_error)
    found.self_test_seconds += self_test_seconds
    _report((metric, _HELP[name], {"backend": backend}, getattr(found, name)) for name, metric in _EXPERTS.items())


@contextmanager
def decoding(kind: str) -> Iterator[None]:
    """Measure how long the block takes to decode one medium; `kind` is `image` or `video`."""
    began = time.perf_counter()
    yield
    _observe("k26_media_decode_seconds", "Seconds to decode one image or video.", time.perf_counter() - began, kind)


@contextmanager
def preprocessing() -> Iterator[None]:
    """Measure how long the block takes to resize, pad and cut the media of one call."""
    began = time.perf_counter()
    yield
    _observe("k26_media_preprocess_seconds", "Seconds to preprocess one call's media.", time.perf_counter() - began)


@functools.cache
def collect_from_workers() -> Path | None:
    """Show the figures of this API server's workers on the server's endpoint, and return the folder for their files.

    The adapter hands the folder to the workers, each of which passes it to `report_to`. Returns None in the workers
    themselves, and where prometheus_client runs in its multiprocess mode.
    """
    if multiprocessing.parent_process() is not None or _MULTIPROCESS_VARIABLE in os.environ:
        return None
    from prometheus_client import REGISTRY

    folder, owner = Path(tempfile.mkdtemp(prefix="k26-metrics-")), os.getpid()
    REGISTRY.register(_Collector(folder))

    def remove() -> None:
        if os.getpid() == owner:  # a forked child runs this handler too
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def report_to(folder: Path | None) -> None:
    """Write this process's figures into `folder` from now on, as `collect_from_workers` returned it."""
    global _folder
    _folder = folder


class _Collector:
    """A Prometheus collector that reads the files of the workers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def collect(self) -> Iterable[Any]:
        from prometheus_client.core import GaugeMetricFamily

        reports = [json.loads(file.read_text()) for file in sorted(self.folder.glob("*.json"))]
        for name, metric in _EXPERTS.items():
            family = GaugeMetricFamily(metric, _HELP[name], labels=["backend", "rank"])
            for report in reports:
                for backend, found in report["experts"].items():
                    family.add_metric([backend, report["rank"]], found[name])
            yield family
        family = GaugeMetricFamily(_CHOICE, _CHOICE_HELP, labels=["experts", "why", "rank"])
        for report in reports:
            for whose, why in report["chosen"].items():
                family.add_metric([whose, why, report["rank"]], 1)
        yield family


def _write(folder: Path) -> None:
    experts = {backend: asdict(found) for backend, found in _loaded.items()}
    report = {"rank": _rank(), "experts": experts, "chosen": _chosen}
    temporary = folder / f"{os.getpid()}.part"
    try:
        temporary.write_text(json.dumps(report))
        temporary.rename(temporary.with_suffix(".json"))
    except OSError:
        return  # a worker on another host cannot reach the folder: this endpoint does not show its figures


def _rank() -> str:
    return str(torch.distributed.get_rank() if torch.distributed.is_initialized() else 0)


def _report(gauges: Iterable[tuple[str, str, dict[str, str], float]]) -> None:
    """Show gauges, given as (name, help text, labels, value), on the endpoint.

    The gauges go through prometheus_client in its multiprocess mode, otherwise through this process's file.
    """
    if _MULTIPROCESS_VARIABLE in os.environ:
        for name, text, labels, value in gauges:
            _gauge(name, text, *labels, "rank").labels(*labels.values(), _rank()).set(value)
    elif _folder is not None:
        _write(_folder)


@functools.cache
def _gauge(name: str, text: str, *labels: str) -> Any:
    from prometheus_client import Gauge

    return Gauge(name, text, labels, multiprocess_mode="max")


@functools.cache
def _histogram(name: str, text: str, *labels: str) -> Any:
    from prometheus_client import Histogram

    return Histogram(name, text, labels, buckets=_SECONDS)


def _observe(name: str, text: str, seconds: float, *kind: str) -> None:
    histogram = _histogram(name, text, *(["kind"] if kind else []))
    (histogram.labels(*kind) if kind else histogram).observe(seconds)
