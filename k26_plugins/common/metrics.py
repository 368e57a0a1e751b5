"""What the core measures, in the engines' Prometheus endpoint, under names `k26_…`.

Experts are loaded in worker processes and the endpoint is the API server's. Where the engine runs prometheus_client in its
multiprocess mode (SGLang with --enable-metrics, vLLM with several API servers) that carries the figures over. In vLLM with
one API server each worker writes a small file, and a collector in the API server reads them at every scrape.
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

FOLDER_VARIABLE = "K26_METRICS_FOLDER"
"""Set by the plugin itself, for the processes that the API server starts."""
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
    """What is reported of one backend in this process."""

    layers: int = 0
    self_test_error: float = 0.0
    self_test_seconds: float = 0.0


_loaded: dict[str, _Experts] = {}
_CHOICE = "k26_experts_choice"
_CHOICE_HELP = "1 for the INT4 experts that `auto` took on a GPU, the core's or the engine's own, and why, by rank."
_chosen: dict[str, str] = {}
_HIT_RATE = "k26_hybrid_hit_rate"
_HIT_RATE_HELP = "Share of the routed experts' uses that a hybrid run's device computed lately, by rank."


def experts_chosen(whose: str, why: str) -> None:
    """What `K26_EXPERTS=auto` took in this process, for all layers."""
    _chosen[whose] = why
    _report([(_CHOICE, _CHOICE_HELP, {"experts": whose, "why": why}, 1)])


def hybrid_hit_rate(share: float) -> None:
    """Report a hybrid run's share. Only SGLang has such runs, and it carries the figure over itself."""
    _report([(_HIT_RATE, _HIT_RATE_HELP, {}, share)])


def experts_loaded(backend: str, self_test_error: float, self_test_seconds: float, *, update: bool = False) -> None:
    """A layer's experts passed their self-test and are in place. update: in that of earlier ones."""
    found = _loaded.setdefault(backend, _Experts())
    found.layers += not update
    found.self_test_error = max(found.self_test_error, self_test_error)
    found.self_test_seconds += self_test_seconds
    _report((metric, _HELP[name], {"backend": backend}, getattr(found, name)) for name, metric in _EXPERTS.items())


@contextmanager
def decoding(kind: str) -> Iterator[None]:
    """Around the decoding of one `image` or `video`."""
    began = time.perf_counter()
    yield
    _observe("k26_media_decode_seconds", "Seconds to decode one image or video.", time.perf_counter() - began, kind)


@contextmanager
def preprocessing() -> Iterator[None]:
    """Around resizing, padding and cutting the media of one request."""
    began = time.perf_counter()
    yield
    _observe("k26_media_preprocess_seconds", "Seconds to preprocess one call's media.", time.perf_counter() - began)


@functools.cache
def collect_from_workers() -> None:
    """Have an API server's workers report, and their reports in its endpoint; to be called before it starts them.

    Does nothing in those workers, nor where prometheus_client carries the figures over itself.
    """
    if multiprocessing.parent_process() is not None or _MULTIPROCESS_VARIABLE in os.environ:
        return
    from prometheus_client import REGISTRY

    folder, owner = tempfile.mkdtemp(prefix="k26-metrics-"), os.getpid()
    os.environ[FOLDER_VARIABLE] = folder
    REGISTRY.register(_Collector(Path(folder)))

    def remove() -> None:
        if os.getpid() == owner:  # and not in a fork of it
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)


class _Collector:
    """The workers' reports as Prometheus wants them."""

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
        return  # a worker on another host: its figures are not in this endpoint


def _rank() -> str:
    return str(torch.distributed.get_rank() if torch.distributed.is_initialized() else 0)


def _report(gauges: Iterable[tuple[str, str, dict[str, str], float]]) -> None:
    """Have the endpoint show gauges by name, text, labels and value: by prometheus_client, or by this process' file."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if _MULTIPROCESS_VARIABLE in os.environ:
        for name, text, labels, value in gauges:
            _gauge(name, text, *labels, "rank").labels(*labels.values(), _rank()).set(value)
    elif folder is not None:
        _write(Path(folder))


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
