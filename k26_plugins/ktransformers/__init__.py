"""The KTransformers adapter: kt-kernel's CPU experts behind the core's interface.

KTransformers serves through SGLang (its fork `sglang-kt`, or upstream with kt-kernel beside it), so its servers are started
by the SGLang adapter, which takes the hybrid run's `--kt-…` flags to the core.
"""
