// Computes what happens to activations between the products: rounding to 16 bits, and SwiGLU.

#pragma once

#include <initializer_list>

#include "kernel.hpp"

namespace k26 {

// Rounds a group of 32 activations to 16-bit multiples of a scale. A group that is not finite gets the scale NaN, so
// that it does not look like numbers further on.
inline void quantize(Floats first, Floats second, Quantized& to, Terms& terms) {
  constexpr float kLargest = 32512;  // 127 · 256, so that the high byte holds it on a set that splits values into bytes
  const float bound = largest(max(abs(first), abs(second)));
  const bool finite = !has_nan((first - first) + (second - second));
  // Below 1e-30 the inverse would overflow, so such a group becomes zero.
  const float inverse = finite && bound > 1e-30f ? kLargest / bound : 0;
  terms.scale = finite ? bound / kLargest : __builtin_nanf("");
  terms.offset = -8 * store_rounded(to, first * all(inverse), second * all(inverse));
}

// Returns e^x with an error of up to 2e-7, as 2^n · e^r with |r| ≤ ln 2 / 2; e^r comes from its series.
inline Floats exponential(Floats x) {
  const Floats bounded = max(min(x, all(89.0f)), all(-104.0f));
  const Floats n = round(bounded * all(1.44269504f));
  Floats r = fnma(n, all(0.693359375f), bounded);
  r = fnma(n, all(-2.12194440e-4f), r);
  Floats sum = all(1.0f / 720);
  for (const float coefficient : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) sum = fma(sum, r, all(coefficient));
  return times_power_of_two(sum, n);
}

// Returns silu(gate) · up.
inline Floats swiglu(Floats gate, Floats up) {
  const Floats denominator = all(1.0f) + exponential(all(0.0f) - gate);
  return gate / denominator * up;
}

}  // namespace k26
