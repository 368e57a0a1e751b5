"""Make one measurement, from a rank's layer to the outcome that servers read."""

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
    """A measurement that this machine can make, and the key under which its outcome is kept."""

    def __init__(self, layer: Layer, engine: str | None, effort: Effort) -> None:
        """Find the GPU and the engine. engine: `vllm`, `sglang`, or None for the one that is installed.

        Raises ValueError if the layer cannot be measured on this machine.
        """
        self.layer, self.effort = layer, effort
        self.device, self.engine = devices.gpu(), devices.engine_to_measure(engine)
        self.key = here(self.device, installed_engine(self.engine), layer.shape)

    def outcome(self, purpose: Purpose, on_begin: Callable[[int], object], on_step: Callable[[str], object]) -> Outcome:
        """Measure, and return the outcome.

        purpose: kept in the outcome. on_begin: called with the number of steps. on_step: called with each step's name.
        """
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
