// AMX's tile registers in plain C++, as Intel's manual defines their instructions. What the processor would refuse ends the
// program: a register that is not configured or was released, shapes that do not fit one another.

#pragma once

#include <cstdint>
#include <cstring>

// The system need not give them: a CPU may have none.
#define TILES_ARE_EMULATED

struct TileRegister {
  int rows = 0, row_bytes = 0;
  uint8_t data[16][64];
};
inline thread_local TileRegister tile_registers[8];

inline void check_tile(bool holds) {
  if (!holds) __builtin_trap();
}

inline TileRegister& tile(int number) {
  check_tile(number >= 0 && number < 8 && tile_registers[number].rows > 0);
  return tile_registers[number];
}

inline void _tile_release() {
  for (TileRegister& each : tile_registers) each = {};
}

inline void _tile_loadconfig(const void* from) {
  uint8_t shapes[64];
  std::memcpy(shapes, from, sizeof(shapes));
  check_tile(shapes[0] == 1);
  for (int i = 1; i < 16; ++i) check_tile(shapes[i] == 0);
  _tile_release();
  for (int i = 0; i < 16; ++i) {
    const int row_bytes = shapes[16 + 2 * i] | shapes[17 + 2 * i] << 8, rows = shapes[48 + i];
    check_tile(row_bytes <= 64 && rows <= 16 && (row_bytes == 0) == (rows == 0) && (i < 8 || rows == 0));
    if (i < 8) tile_registers[i].rows = rows, tile_registers[i].row_bytes = row_bytes;
  }
}

inline void _tile_zero(int to) { std::memset(tile(to).data, 0, sizeof(TileRegister::data)); }

inline void _tile_loadd(int to, const void* from, int64_t stride) {
  _tile_zero(to);
  for (int row = 0; row < tile(to).rows; ++row)
    std::memcpy(tile(to).data[row], static_cast<const char*>(from) + row * stride, tile(to).row_bytes);
}

inline void _tile_stored(int from, void* to, int64_t stride) {
  for (int row = 0; row < tile(from).rows; ++row)
    std::memcpy(static_cast<char*>(to) + row * stride, tile(from).data[row], tile(from).row_bytes);
}

// to[m][n] += Σ a[m][k] · b[k][n] over the pairs of each k, in bfloat16; sums in float32, to nearest.
inline void _tile_dpbf16ps(int to, int a, int b) {
  check_tile(to != a && to != b && a != b);
  check_tile(tile(to).rows == tile(a).rows && tile(to).row_bytes == tile(b).row_bytes && tile(a).row_bytes == 4 * tile(b).rows);
  const auto value = [](const uint8_t* from) {
    float wide;
    const uint8_t bytes[4] = {0, 0, from[0], from[1]};
    std::memcpy(&wide, bytes, sizeof(wide));
    return wide;
  };
  for (int m = 0; m < tile(a).rows; ++m)
    for (int n = 0; n < tile(b).row_bytes / 4; ++n) {
      float sum;
      std::memcpy(&sum, tile(to).data[m] + 4 * n, sizeof(sum));
      for (int k = 0; k < tile(b).rows; ++k)
        for (int i = 0; i < 4; i += 2) sum += value(tile(a).data[m] + 4 * k + i) * value(tile(b).data[k] + 4 * n + i);
      std::memcpy(tile(to).data[m] + 4 * n, &sum, sizeof(sum));
    }
}
