"""`python -m k26_plugins.operate.tune 7168x256x384 vllm`: what a server's start runs with K26_TUNE=start, on its GPU.

The quick measurement, for the sizes of a rank as an outcome names them. Ends with 1 and one line on the error stream where
it cannot be made or kept.
"""

from __future__ import annotations

import sys

from k26_plugins.common.experts.outcome import outcome_file, write_outcome
from k26_plugins.common.purpose import Purpose
from k26_plugins.operate.tune.measure import QUICK
from k26_plugins.operate.tune.routing import Layer
from k26_plugins.operate.tune.run import Run


def main(shape: str, engine: str) -> None:
    try:
        run = Run(Layer.of_shape(shape), engine, QUICK)
        outcome = run.outcome(Purpose.BOTH, on_begin=lambda steps: None, on_step=lambda step: None)
        write_outcome(outcome, outcome_file(run.key))
    except (OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
