"""The KTransformers adapter: kt-kernel's CPU experts behind the core's interface.

KTransformers serves through SGLang (its fork `sglang-kt`, or upstream SGLang with kt-kernel installed beside it). So
the SGLang adapter is active in its servers, and passes the `--kt-…` flags of a hybrid run on to the core.
"""
