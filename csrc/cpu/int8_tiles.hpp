// Multiplies quantised rows by panels of an int8 weight (linear_int8.hpp), in matrix tiles.
//
// A panel holds, for each 4 inputs, 4 bytes of each of 32 columns: two tiles of 16 columns, side by side. A unit is 32
// rows by one panel and a few groups of inputs. Each group's sums are stored as they are; then all of them become
// floats, in one pass, while the processor begins the next unit.
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
  static constexpr int64_t kGroups = 4, kInputs = 512;  // per unit, at most: the unit has to fit the L1 cache
  // Of one group: columns 0 to 15 and 16 to 31 of 16 rows, then of 16 more.
  typedef int32_t Sums[4][kTileRows * kTileRows];

  struct Unit {
    Int8Rows x;           // from the first group on
    const int8_t* panel;  // from the first group on
    float* out;
    int64_t rows, ldo, depth;  // depth: of a group
    Sums* sums;
  };

  static void multiply(const TileShapes& shapes, const Int8Weight& w, const Int8Rows& x, int64_t rows, int64_t panel,
                       int64_t count, float* out, int64_t ldo) {
    alignas(64) Sums sums[kGroups];
    const Tiles tiles(shapes);
    const int64_t bytes = int8_panel_bytes(w.in, w.group), whole = w.in / w.group;
    const int8_t* from = w.panels + panel * bytes;
    for (int64_t g = 0, end; g < int8_groups(w.in, w.group); g = end) {
      const int64_t k = g * w.group, depth = least(w.in - k, w.group);
      end = g < whole ? least(g + least(kGroups, kInputs / w.group), whole) : g + 1;  // a shorter last group is alone
      const int8_t* here = from + g * (w.group * kPanel + 2 * kScaleSlots);
      for (int64_t r = 0; r < rows; r += kRows) {
        Int8Rows part = from_row(x, r);  // stays in the L1 cache for all panels
        part.values += k, part.scale += g, part.zero += g;
        for (int64_t p = 0; p < count; ++p) {
          const Unit unit{part, here + p * bytes, out + r * ldo + p * kPanel, least(rows - r, kRows), ldo, depth, sums};
          g ? multiply<true>(unit, int(end - g)) : multiply<false>(unit, int(end - g));
        }
      }
    }
  }

  template <bool Add>
  static void multiply(const Unit& unit, int groups) {
    const bool two = unit.rows > kTileRows;
    const int steps = int(unit.depth / kStep);
    for (int g = 0; g < groups; ++g) {
      const uint8_t* a = unit.x.values + g * unit.depth;
      const int8_t* b = unit.panel + g * (unit.depth * kPanel + 2 * kScaleSlots);
      two ? products<true>(a, unit.x.stride, b, steps, unit.sums[g])
          : products<false>(a, unit.x.stride, b, steps, unit.sums[g]);
    }
    if (groups == 4) return finish<4, Add>(unit);
    if (groups == 3) return finish<3, Add>(unit);
    if (groups == 2) return finish<2, Add>(unit);
    finish<1, Add>(unit);
  }

  template <bool Two>
  static inline void products(const uint8_t* a, int64_t lda, const int8_t* b, int steps, Sums& to) {
    tile_zero<0>();
    tile_zero<1>();
    if (Two) tile_zero<2>();
    if (Two) tile_zero<3>();
    for (int s = 0; s < steps; ++s, a += kStep, b += kStep * kPanel) {
      tile_load<4>(a, lda);
      tile_load<6>(b, 4 * kPanel);
      tile_multiply_u8_i8<0, 4, 6>();
      tile_load<7>(b + kTileBytes, 4 * kPanel);
      tile_multiply_u8_i8<1, 4, 7>();
      if (!Two) continue;
      tile_load<5>(a + kTileRows * lda, lda);
      tile_multiply_u8_i8<2, 5, 6>();
      tile_multiply_u8_i8<3, 5, 7>();
    }
    tile_store<0>(to[0], kTileBytes);
    tile_store<1>(to[1], kTileBytes);
    if (Two) tile_store<2>(to[2], kTileBytes);
    if (Two) tile_store<3>(to[3], kTileBytes);
  }

  template <int Groups, bool Add>
  static void finish(const Unit& unit) {
    constexpr int64_t kVectors = kPanel / kWidth;
    Vec scales[Groups][kVectors], column_sums[Groups][kVectors];
    const int8_t* tail = unit.panel + unit.depth * kPanel;
    for (int g = 0; g < Groups; ++g, tail += unit.depth * kPanel + 2 * kScaleSlots) {
      __builtin_memcpy(scales[g], tail, sizeof scales[g]);
      __builtin_memcpy(column_sums[g], tail + kScaleSlots, sizeof column_sums[g]);
    }
    const float *zero = unit.x.zero, *scale = unit.x.scale;
    float* out = unit.out;
    for (int64_t m = 0; m < unit.rows; ++m, out += unit.ldo, zero += unit.x.groups, scale += unit.x.groups) {
      const int32_t* sums = unit.sums[0][m / kTileRows * 2] + m % kTileRows * kTileRows;
#pragma GCC unroll 8
      for (int64_t i = 0; i < kVectors; ++i) {
        const int64_t column = i * kWidth, tile = column / kTileRows;
        Vec total = Add ? load(out + column) : Vec{};
#pragma GCC unroll 4
        for (int64_t g = 0; g < Groups; ++g) {
          VecI exact;
          __builtin_memcpy(&exact, sums + (4 * g + tile) * kTileRows * kTileRows + column % kTileRows, sizeof exact);
          const Vec v = group_term(exact, zero[g], column_sums[g][i], scale[g], scales[g][i]);
          total = Add || g ? total + v : v;
        }
        store(out + column, total);
      }
    }
  }
};

}  // namespace tf::TF_ISA
#endif
