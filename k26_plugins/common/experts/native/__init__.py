"""INT4 experts in C++, built on the machine that runs them."""

from k26_plugins.common.experts.native.backend import NativeExperts
from k26_plugins.common.experts.native.in_stream import ExpertsInStream

__all__ = ["ExpertsInStream", "NativeExperts"]
