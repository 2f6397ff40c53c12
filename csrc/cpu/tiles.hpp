// Matrix tiles (Intel AMX): eight registers per thread, of at most 16 rows of 64 bytes, and products of two of them.
//
// A product C += A B takes rows of A (M, 64 bytes) and B (16, 64 bytes), whose row k holds, for each of 16 columns, the
// 4 bytes (or 2 bf16) that multiply bytes 4k to 4k + 3 of a row of A. It takes 16 cycles, for M rows M cycles.
// With TF_EMULATE_TILES tiles are memory: for machines without AMX, and for sanitizers, which do not see tile loads.
#pragma once
#include <cstdint>

#if defined(__AMX_TILE__) || defined(TF_EMULATE_TILES)
#define TF_TILES

namespace tf::TF_ISA {

constexpr int64_t kTileRows = 16, kTileBytes = 64;

// The shapes of the eight tiles; the layout is the processor's.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
  constexpr TileShapes() {
    for (int i = 0; i < 8; ++i) row_bytes[i] = kTileBytes, rows[i] = kTileRows;
  }
};

#if !defined(TF_EMULATE_TILES)
static inline void tile_shapes(const TileShapes& s) { asm volatile("ldtilecfg %0" ::"m"(s)); }
static inline void tile_release() { asm volatile("tilerelease" ::: "memory"); }
template <int T>
static inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
static inline void tile_load(const void* from, int64_t stride) {  // bytes from row to row
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
static inline void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
// C (M, 16) int32 += A (M, 64) u8 times B (64, 16) int8.
template <int C, int A, int B>
static inline void tile_multiply_u8_i8() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
// C (M, 16) float32 += A (M, 32) bf16 times B (32, 16) bf16. Denormal numbers count as zeros.
template <int C, int A, int B>
static inline void tile_multiply_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
#else
struct EmulatedTiles {
  TileShapes shapes;
  alignas(64) uint8_t bytes[8][kTileRows][kTileBytes];
};
inline thread_local EmulatedTiles tiles;
static inline void tile_shapes(const TileShapes& s) {
  tiles.shapes = s;
  __builtin_memset(tiles.bytes, 0, sizeof tiles.bytes);
}
static inline void tile_release() {
  tile_shapes(TileShapes());
  __builtin_memset(&tiles.shapes, 0, sizeof tiles.shapes);
}
template <int T>
static inline void tile_zero() {
  __builtin_memset(tiles.bytes[T], 0, sizeof tiles.bytes[T]);
}
template <int T>
static inline void tile_load(const void* from, int64_t stride) {
  tile_zero<T>();
  for (int64_t r = 0; r < tiles.shapes.rows[T]; ++r)
    __builtin_memcpy(tiles.bytes[T][r], static_cast<const char*>(from) + r * stride, tiles.shapes.row_bytes[T]);
}
template <int T>
static inline void tile_store(void* to, int64_t stride) {
  for (int64_t r = 0; r < tiles.shapes.rows[T]; ++r)
    __builtin_memcpy(static_cast<char*>(to) + r * stride, tiles.bytes[T][r], tiles.shapes.row_bytes[T]);
}
// term(sum, word of A, word of B) for each word of C and each word of the rows of A.
template <int C, int A, int B, class Sum, class Term>
static inline void emulate_product(const Term& term) {
  const auto& s = tiles.shapes;
  for (int64_t m = 0; m < s.rows[C]; ++m)
    for (int64_t n = 0; n < s.row_bytes[C] / 4; ++n) {
      Sum sum;
      __builtin_memcpy(&sum, tiles.bytes[C][m] + 4 * n, 4);
      for (int64_t k = 0; k < s.row_bytes[A] / 4; ++k)
        sum = term(sum, tiles.bytes[A][m] + 4 * k, tiles.bytes[B][k] + 4 * n);
      __builtin_memcpy(tiles.bytes[C][m] + 4 * n, &sum, 4);
    }
}
template <int C, int A, int B>
static inline void tile_multiply_u8_i8() {
  emulate_product<C, A, B, int32_t>([](int32_t sum, const uint8_t* a, const uint8_t* b) {
    for (int i = 0; i < 4; ++i) sum += int32_t(a[i]) * int8_t(b[i]);
    return sum;
  });
}
template <int C, int A, int B>
static inline void tile_multiply_bf16() {
  emulate_product<C, A, B, float>([](float sum, const uint8_t* a, const uint8_t* b) {
    const auto value = [](const uint8_t* p) {
      const uint32_t bits = (uint32_t(p[1]) << 8 | p[0]) << 16;
      float v;
      __builtin_memcpy(&v, &bits, 4);
      return bits & 0x7f800000 ? v : 0.f;
    };
    for (int i = 0; i < 2; ++i) sum += value(a + 2 * i) * value(b + 2 * i);
    return sum;
  });
}
#endif

// Tiles of these shapes while it lives. One at a time per thread; only inside the body of a parallel loop.
struct Tiles {
  explicit Tiles(const TileShapes& shapes = TileShapes()) { tile_shapes(shapes); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() { tile_release(); }
};

}  // namespace tf::TF_ISA
#endif
