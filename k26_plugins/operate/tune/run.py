"""One measurement from a rank's layer to the outcome that servers read."""

from __future__ import annotations

from collections.abc import Callable

from k26_plugins.common.experts.outcome import Outcome
from k26_plugins.common.experts.tuned import here, installed_engine
from k26_plugins.common.purpose import Purpose
from k26_plugins.operate.tune import device as devices
from k26_plugins.operate.tune.clock import clock_of
from k26_plugins.operate.tune.measure import Effort, Measurement, random_weights
from k26_plugins.operate.tune.routing import Layer


class Run:
    """What is measured, and its key. Raises ValueError where it cannot be measured here."""

    def __init__(self, layer: Layer, engine: str | None, effort: Effort) -> None:
        """engine: `vllm` or `sglang`, the one that is installed if not given."""
        self.layer, self.effort = layer, effort
        self.device, self.engine = devices.gpu(), devices.engine_to_measure(engine)
        self.key = here(self.device, installed_engine(self.engine), layer.shape)

    def outcome(self, purpose: Purpose, on_begin: Callable[[int], object], on_step: Callable[[str], object]) -> Outcome:
        """on_begin: told the number of steps. on_step: told each as it begins."""
        measurement = Measurement(
            self.layer,
            random_weights(self.layer, self.device),
            devices.peers_of(self.engine),
            self.effort,
            clock_of(self.device),
            on_step,
        )
        on_begin(measurement.steps)
        tiles, timings = measurement.run()
        return Outcome(self.key, purpose, tiles, timings)
