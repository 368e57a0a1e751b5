// What a group of a tile costs, for a token alone and for four whose weights are unpacked: to be read as instructions.

#include "kernel.hpp"

using namespace k26;

extern "C" void one(const uint8_t* lines, const Quantized* x, int32_t start, Ints* sums) {
  *sums = sums_of_one(lines, *x, start);
}

extern "C" void four(const Weights* weights, const Quantized* const (&x)[4], const int32_t (&start)[4], Ints (&sums)[4]) {
  weights->sums<4>(x, start, sums);
}
