// Runs the native experts without Python, on the pool's threads, so that they can be compiled for another machine or with
// a sanitizer:
//
//     driver GIVEN RESULT THREADS
//
// GIVEN: int64 experts, hidden, intermediate, tokens, top_k; then as the checkpoint has them w13, its scales, w2, its scales; x in
// bfloat16, ids in int32, weights in float32. RESULT: float32 [tokens, hidden] three times: the batch on the pool, its tokens
// one by one and all in flight at once, the batch on OpenMP's threads where the program has them.

#include "experts.cpp"

#include <cstdio>
#include <memory>

using namespace k26;

// Of exactly its size, so that an access beyond it is found.
template <class T>
std::unique_ptr<T[]> read(FILE* file, int64_t count) {
  std::unique_ptr<T[]> values(new T[count]);
  if (fread(values.get(), sizeof(T), count, file) != static_cast<size_t>(count)) std::abort();
  return values;
}

int main(int, char** arguments) {
  FILE* given = fopen(arguments[1], "rb");
  const auto sizes = read<int64_t>(given, 5);
  const int64_t experts = sizes[0], hidden = sizes[1], intermediate = sizes[2], tokens = sizes[3], top_k = sizes[4];
  const auto w13 = read<uint8_t>(given, experts * hidden * intermediate);
  const auto w13_scale = read<uint16_t>(given, experts * 2 * intermediate * hidden / kGroup);
  const auto w2 = read<uint8_t>(given, experts * hidden * intermediate / 2);
  const auto w2_scale = read<uint16_t>(given, experts * hidden * intermediate / kGroup);
  const auto x = read<uint16_t>(given, tokens * hidden);
  const auto ids = read<int32_t>(given, tokens * top_k);
  const auto weights = read<float>(given, tokens * top_k);
  fclose(given);

  const int64_t threads = std::atoi(arguments[3]);
  std::vector<int32_t> cpus(threads), nodes(threads, 0);
  for (int64_t i = 0; i < threads; ++i) cpus[i] = static_cast<int32_t>(i % sysconf(_SC_NPROCESSORS_ONLN));
  nodes.back() = threads > 2;
  // Never freed, as in a process that serves: the pool's threads use it until the end.
#ifndef TILES_ARE_EMULATED
  if (k26_refusal() != 0) return 3;
#endif
  static Process* process = k26_create();
  if (k26_start(process, cpus.data(), nodes.data(), threads) != 1) return 1;
  const Layer layer{w13.get(), w13_scale.get(), w2.get(), w2_scale.get(), experts, hidden, intermediate};
  if (k26_repack(process, &layer, 0) != 0) return 2;

  std::vector<float> results(3 * tokens * hidden);
  const auto call = [&](int64_t first, int64_t count, float* out) {
    return Call{x.get() + first * hidden, ids.get() + first * top_k, weights.get() + first * top_k, nullptr, 0, count,
                top_k, out, 1};
  };
  const Call whole = call(0, tokens, results.data());
  k26_run(process, &layer, &whole, 0);
  int64_t job = 0;
  for (int64_t token = 0; token < tokens; ++token) {
    const Call one = call(token, 1, results.data() + (tokens + token) * hidden);
    job = k26_submit(process, &layer, &one);
  }
  k26_wait(process, job);
  const Call again = call(0, tokens, results.data() + 2 * tokens * hidden);
  k26_run(process, &layer, &again, k26_has_team(process) ? threads : 0);

  FILE* result = fopen(arguments[2], "wb");
  fwrite(results.data(), sizeof(float), results.size(), result);
  fclose(result);
  printf("%s\n", k26_instruction_set());
  return 0;
}
