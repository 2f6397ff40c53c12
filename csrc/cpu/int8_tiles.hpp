// Multiplies quantised rows by panels of an int8 weight (linear_int8.hpp), in matrix tiles.
//
// A panel holds, for each 4 inputs, 4 bytes of each of 32 columns: two tiles of 16 columns, side by side. A unit is one
// group of inputs by one panel and up to 32 rows. Its sums are stored as they are, and become floats while the next unit
// is multiplied: the processor does both at once.
#pragma once
#include "linear_int8_quantize.hpp"
#include "parallel.hpp"
#include "tiles.hpp"

#if defined(TF_TILES)
namespace tf::TF_ISA {

class Int8Tiles {
 public:
  static constexpr int64_t kRows = 2 * kTileRows, kStep = 64;  // rows per unit, inputs per product of tiles

  // Whether the groups of a weight are whole tiles.
  static bool fit(int64_t in, int64_t group) { return in % kStep == 0 && group % kStep == 0; }

  // out (rows, 32 count), rows ldo apart, = x W^T for the columns from 32 panel on.
  static void multiply(const Int8Weight& w, const Int8Rows& x, int64_t rows, int64_t panel, int64_t count, float* out,
                       int64_t ldo) {
    const int64_t whole = rows / kRows * kRows, rest = rows - whole;
    if (whole) {
      static const TileShapes shapes;
      multiply(shapes, w, x, whole, panel, count, out, ldo);
    }
    if (!rest) return;
    TileShapes shapes;
    const int64_t first = rest < kTileRows ? rest : kTileRows;
    shapes.rows[0] = shapes.rows[1] = shapes.rows[4] = uint8_t(first);
    shapes.rows[2] = shapes.rows[3] = shapes.rows[5] = uint8_t(rest > first ? rest - first : 1);
    multiply(shapes, w, from_row(x, whole), rest, panel, count, out + whole * ldo, ldo);
  }

 private:
  typedef int32_t Sums[4][kTileRows * kTileRows];  // of tiles 0 to 3: columns 0 to 15 and 16 to 31 of 16 rows, and of 16 more

  struct Unit {  // sums that are not floats yet
    const float* column;  // the scales of 32 columns, then the sums of their weights
    const float *zero, *scale;
    float* out;
    int64_t rows, groups, ldo;
    bool first;
    const Sums* sums;
  };

  static void multiply(const TileShapes& shapes, const Int8Weight& w, const Int8Rows& x, int64_t rows, int64_t panel,
                       int64_t count, float* out, int64_t ldo) {
    alignas(64) Sums sums[2];
    const Tiles tiles(shapes);
    const int64_t bytes = int8_panel_bytes(w.in, w.group);
    const int8_t* from = w.panels + panel * bytes;
    Unit before{};
    int64_t n = 0;
    for (int64_t k = 0, g = 0; k < w.in; k += w.group, ++g) {
      const int64_t depth = least(w.in - k, w.group), size = depth * kPanel + 2 * kScaleSlots;
      for (int64_t p = 0; p < count; ++p) {
        const int8_t* here = from + p * bytes;
        const int8_t* next = p + 1 < count ? here + bytes : from + size;
        for (int64_t r = 0; r < rows; r += kRows) {
          const Int8Rows part = from_row(x, r);
          Unit unit{reinterpret_cast<const float*>(here + depth * kPanel), part.zero + g, part.scale + g,
                    out + r * ldo + p * kPanel, least(rows - r, kRows), x.groups, ldo, g == 0, &sums[n++ % 2]};
          multiply(int(depth / kStep), part.values + k, x.stride, here, r ? nullptr : next, unit, before);
          before = unit;
        }
      }
      from += size;
    }
    finish(before, 0, before.rows);
  }

  static void multiply(int steps, const uint8_t* a, int64_t lda, const int8_t* b, const int8_t* next, const Unit& unit,
                       const Unit& before) {
    const bool two = unit.rows > kTileRows;
    if (steps == 4) return two ? multiply<4, true>(a, lda, b, next, unit, before) : multiply<4, false>(a, lda, b, next, unit, before);
    if (steps == 3) return two ? multiply<3, true>(a, lda, b, next, unit, before) : multiply<3, false>(a, lda, b, next, unit, before);
    if (steps == 2) return two ? multiply<2, true>(a, lda, b, next, unit, before) : multiply<2, false>(a, lda, b, next, unit, before);
    two ? multiply<1, true>(a, lda, b, next, unit, before) : multiply<1, false>(a, lda, b, next, unit, before);
  }

  // Multiplies the unit, and between the products finishes the one before.
  template <int Steps, bool Two>
  static inline void multiply(const uint8_t* a, int64_t lda, const int8_t* b, const int8_t* next, const Unit& unit,
                              const Unit& before) {
    constexpr int64_t kSlots = Steps * (Two ? 4 : 2), kEach = (kRows + kSlots - 1) / kSlots;
    const auto between = [&](int64_t slot) {
      finish(before, slot * kEach, kEach);
      if (next)
        for (int64_t i = 0; i < kStep * kPanel * Steps / kSlots; i += 64)
          __builtin_prefetch(next + slot * (kStep * kPanel * Steps / kSlots) + i);
    };
    tile_zero<0>();
    tile_zero<1>();
    if (Two) tile_zero<2>();
    if (Two) tile_zero<3>();
#pragma GCC unroll 4
    for (int64_t s = 0; s < Steps; ++s, a += kStep, b += kStep * kPanel) {
      constexpr int64_t kPerStep = Two ? 4 : 2;
      tile_load<4>(a, lda);
      tile_load<6>(b, 4 * kPanel);
      tile_multiply_u8_i8<0, 4, 6>();
      between(s * kPerStep);
      tile_load<7>(b + kTileBytes, 4 * kPanel);
      tile_multiply_u8_i8<1, 4, 7>();
      between(s * kPerStep + 1);
      if (!Two) continue;
      tile_load<5>(a + kTileRows * lda, lda);
      tile_multiply_u8_i8<2, 5, 6>();
      between(s * kPerStep + 2);
      tile_multiply_u8_i8<3, 5, 7>();
      between(s * kPerStep + 3);
    }
    int32_t(*to)[kTileRows * kTileRows] = const_cast<Sums&>(*unit.sums);
    tile_store<0>(to[0], kTileBytes);
    tile_store<1>(to[1], kTileBytes);
    if (Two) tile_store<2>(to[2], kTileBytes);
    if (Two) tile_store<3>(to[3], kTileBytes);
  }

  // Adds `count` rows of a unit to the results.
  static inline void finish(const Unit& u, int64_t from, int64_t count) {
    if (from >= u.rows) return;
    const int64_t end = least(from + count, u.rows);
    Vec scales[2], sums[2];
    __builtin_memcpy(scales, u.column, sizeof scales);
    __builtin_memcpy(sums, u.column + kPanel, sizeof sums);
    for (int64_t m = from; m < end; ++m) {
      float* to = u.out + m * u.ldo;
      const float zero = u.zero[m * u.groups], scale = u.scale[m * u.groups];
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        VecI exact;
        __builtin_memcpy(&exact, (*u.sums)[m / kTileRows * 2 + i] + m % kTileRows * kTileRows, sizeof exact);
        const Vec v = group_term(exact, zero, sums[i], scale, scales[i]);
        store(to + i * kWidth, u.first ? v : load(to + i * kWidth) + v);
      }
    }
  }
};

}  // namespace tf::TF_ISA
#endif
