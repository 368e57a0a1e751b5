"""The layers that the benchmarks run: the published model's whole layer, and one rank's part of it."""

from __future__ import annotations

from k26_plugins.operate.tune.routing import Layer

GLOBAL_EXPERTS = 384
TOP_K = 8
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
LAYERS = {
    layer.name: layer
    for layer in (Layer("whole", 7168, 2048, 384), Layer("tp8", 7168, 256, 384), Layer("ep8", 7168, 2048, 48))
}
