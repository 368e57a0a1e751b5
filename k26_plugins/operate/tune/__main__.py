"""`python -m k26_plugins.operate.tune 7168x256x384 vllm`: make the quick measurement of `k26 tune`.

With K26_TUNE=start a server runs this program on its own GPU when it starts. The first argument is the sizes of a rank
as an outcome names them (hidden size, intermediate size, experts), the second is the engine. The program ends with
status 1 and one line on the error stream if the measurement cannot be made or its outcome cannot be written.
"""

from __future__ import annotations

import sys

from k26_plugins.common.experts.outcome import outcome_file, write_outcome
from k26_plugins.common.purpose import Purpose
from k26_plugins.operate.tune.measure import QUICK
from k26_plugins.operate.tune.routing import Layer
from k26_plugins.operate.tune.run import Run


def main(shape: str, engine: str) -> None:
    """Measure a rank's layer for an engine, and write the outcome where servers look for it."""
    try:
        run = Run(Layer.of_shape(shape), engine, QUICK)
        outcome = run.outcome(Purpose.BOTH, on_begin=lambda steps: None, on_step=lambda step: None)
        write_outcome(outcome, outcome_file(run.key))
    except (OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
