// What the products of bfloat16 in matrix tiles share.
#pragma once
#include "activation_math.hpp"
#include "attention_tile.hpp"
#include "linear.hpp"
#include "parallel.hpp"
#include "tiles.hpp"

namespace tf::TF_ISA {

struct Identity {
  static inline Vec apply(Vec v) { return v; }
};
template <class A>
struct Activated {
  static inline Vec apply(Vec v) {
    Vec y, d;
    Rounded<bf16, A>::type::compute(v, y, d);
    return y;
  }
};
#if defined(TF_TILES)
constexpr int64_t kStep = 32;                     // inputs per product of tiles
constexpr int64_t kTile = kTileRows * kTileRows;  // 32-bit words of a tile
#endif

}  // namespace tf::TF_ISA
