"""Compute INT4 experts in C++, by a library that the wheel brings or that is compiled on the machine that runs it."""

from k26_plugins.common.experts.native.backend import NativeExperts
from k26_plugins.common.experts.native.in_stream import ExpertsInStream

__all__ = ["ExpertsInStream", "NativeExperts"]
