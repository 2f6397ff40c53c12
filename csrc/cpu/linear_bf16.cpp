// y = act(x W^T + b) for few rows of x in bfloat16, by matrix tiles (AMX).
//
// For few rows the time is that of reading the weight. It is read once, in place: 16 of its rows are a tile as they
// are, and x is laid out as the other factor. So the sums are those of y^T, and are transposed on their way out.
#include "activation_math.hpp"
#include "attention_tile.hpp"
#include "kernels.hpp"
#include "linear.hpp"
#include "parallel.hpp"
#include "tiles.hpp"

namespace tf::TF_ISA {
namespace {
struct Identity {
  static inline Vec apply(Vec v) { return v; }
};
template <class A>
struct Activated {
  static inline Vec apply(Vec v) {
    Vec y, d;
    A::compute(v, y, d);
    return y;
  }
};

#if defined(TF_TILES)

constexpr int64_t kStep = 32;                 // inputs per product of tiles
constexpr int64_t kGroup = 4 * kTileRows;     // rows of the weight that are read together
constexpr int64_t kTile = kTileRows * kTileRows;  // 32-bit words of a tile

class FewRows {
 public:
  explicit FewRows(const LinearBf16& l)
      : l_(l), steps_((l.in + kStep - 1) / kStep), strips_((l.rows + kTileRows - 1) / kTileRows),
        groups_((l.out + kGroup - 1) / kGroup) {}

  template <class Act>
  void run() {
    x_ = scratch<float>(0, strips_ * steps_ * kTile);
    parallel_for(strips_, 1 + 8 / steps_, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) lay_out(s);
    });
    parallel_for(groups_, 1, [&](int64_t begin, int64_t end) {
      const Tiles tiles;
      for (int64_t g = begin; g < end; ++g) group<Act>(g * kGroup);
    });
  }

 private:
  // Rows of the weight: where they are, or a padded copy.
  struct Rows {
    const bf16* at;
    int64_t stride;
  };

  // A strip of 16 rows of x, with zeros for what is missing: (16 steps, 16) words of two inputs.
  void lay_out(int64_t strip) const {
    const int64_t row = strip * kTileRows, words = (l_.in + 1) / 2;
    float* const to = x_ + strip * steps_ * kTile;
    load_pairs_transposed(static_cast<const bf16*>(l_.x) + row * l_.x_stride, l_.x_stride, l_.rows - row, l_.in, to,
                          kTileRows);
    __builtin_memset(to + words * kTileRows, 0, size_t(steps_ * kTile - words * kTileRows) * sizeof(float));
  }

  Rows weight_rows(int64_t first) const {
    const bf16* from = static_cast<const bf16*>(l_.weight) + first * l_.out_stride;
    const int64_t count = least(kGroup, l_.out - first), padded = steps_ * kStep;
    if (count == kGroup && l_.in == padded) return {from, l_.out_stride};
    bf16* const copy = scratch<bf16>(1, kGroup * padded);
    __builtin_memset(copy, 0, size_t(kGroup * padded) * sizeof(bf16));
    for (int64_t r = 0; r < count; ++r)
      __builtin_memcpy(copy + r * padded, from + r * l_.out_stride, size_t(l_.in) * sizeof(bf16));
    return {copy, padded};
  }

  template <class Act>
  void group(int64_t first) const {
    const Rows weight = weight_rows(first);
    alignas(64) float sums[4][kTile];
    int64_t s = 0;
    for (; s + 2 <= strips_; s += 2)
      for (int64_t half = 0; half < 2; ++half) {
        two_by_two({weight.at + half * 2 * kTileRows * weight.stride, weight.stride}, s, sums);
        for (int64_t i = 0; i < 4; ++i) finish<Act>(sums[i], first + (2 * half + i / 2) * kTileRows, s + i % 2);
      }
    if (s == strips_) return;
    four_by_one(weight, s, sums);
    for (int64_t i = 0; i < 4; ++i) finish<Act>(sums[i], first + i * kTileRows, s);
  }

  // Two tiles of the weight's rows by two strips.
  void two_by_two(Rows weight, int64_t strip, float (&sums)[4][kTile]) const {
    const float *x = x_ + strip * steps_ * kTile, *second = x + steps_ * kTile;
    const bf16* below = weight.at + kTileRows * weight.stride;
    const int64_t bytes = weight.stride * int64_t(sizeof(bf16));
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    for (int64_t k = 0; k < steps_; ++k) {
      tile_load<4>(x + k * kTile, kTileBytes);
      tile_load<5>(second + k * kTile, kTileBytes);
      tile_load<6>(weight.at + k * kStep, bytes);
      tile_multiply_bf16<0, 6, 4>();
      tile_multiply_bf16<1, 6, 5>();
      tile_load<7>(below + k * kStep, bytes);
      tile_multiply_bf16<2, 7, 4>();
      tile_multiply_bf16<3, 7, 5>();
    }
    store(sums);
  }

  // Four tiles of the weight's rows by one strip.
  void four_by_one(Rows weight, int64_t strip, float (&sums)[4][kTile]) const {
    const float* x = x_ + strip * steps_ * kTile;
    const bf16* w = weight.at;
    const int64_t down = kTileRows * weight.stride, bytes = weight.stride * int64_t(sizeof(bf16));
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    for (int64_t k = 0; k < steps_; ++k, w += kStep) {
      tile_load<4>(x + k * kTile, kTileBytes);
      tile_load<5>(w, bytes);
      tile_multiply_bf16<0, 5, 4>();
      tile_load<6>(w + down, bytes);
      tile_multiply_bf16<1, 6, 4>();
      tile_load<7>(w + 2 * down, bytes);
      tile_multiply_bf16<2, 7, 4>();
      tile_load<5>(w + 3 * down, bytes);
      tile_multiply_bf16<3, 5, 4>();
    }
    store(sums);
  }

  static void store(float (&sums)[4][kTile]) {
    tile_store<0>(sums[0], kTileBytes);
    tile_store<1>(sums[1], kTileBytes);
    tile_store<2>(sums[2], kTileBytes);
    tile_store<3>(sums[3], kTileBytes);
  }

  // sums (columns, rows): 16 columns of y from `column` on, 16 rows of a strip.
  template <class Act>
  void finish(const float* sums, int64_t column, int64_t strip) const {
    const int64_t rows = least(kTileRows, l_.rows - strip * kTileRows), columns = least(kTileRows, l_.out - column);
    bf16* const y = static_cast<bf16*>(l_.y) + strip * kTileRows * l_.out + column;
    for (int64_t c = 0; c < columns; c += kWidth) {
      const Vec bias = l_.bias ? load_some(static_cast<const bf16*>(l_.bias) + column + c, columns - c) : Vec{};
      for (int64_t r = 0; r < rows; r += kWidth) {
        Vec tile[kWidth];
        for (int64_t i = 0; i < kWidth; ++i) tile[i] = load(sums + (c + i) * kTileRows + r);
        transpose(tile);
        for (int64_t i = 0; i < kWidth && r + i < rows; ++i)
          store_some(y + (r + i) * l_.out + c, Act::apply(tile[i] + bias), columns - c);
      }
    }
  }

  const LinearBf16& l_;
  const int64_t steps_, strips_, groups_;
  float* x_ = nullptr;
};

#else

class FewRows {
 public:
  explicit FewRows(const LinearBf16& l) : l_(l) {}

  template <class Act>
  void run() const {
    parallel_for(l_.out, 1 + 4096 / (l_.in * l_.rows), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        const bf16* w = static_cast<const bf16*>(l_.weight) + c * l_.out_stride;
        const float bias = l_.bias ? to_float(static_cast<const bf16*>(l_.bias)[c]) : 0.f;
        for (int64_t r = 0; r < l_.rows; ++r) {
          const bf16* x = static_cast<const bf16*>(l_.x) + r * l_.x_stride;
          const Vec products = sum_columns(l_.in, [&](int64_t k, auto part) { return load(x + k, part) * load(w + k, part); });
          from_float(static_cast<bf16*>(l_.y)[r * l_.out + c], Act::apply(broadcast(sum(products) + bias))[0]);
        }
      }
    });
  }

 private:
  const LinearBf16& l_;
};

#endif
}  // namespace

void linear_bf16(const LinearBf16& l) {
  if (!l.has_activation)
    FewRows(l).run<Identity>();
  else
    with_activation(l.activation, [&](auto a) { FewRows(l).run<Activated<decltype(a)>>(); });
}

}  // namespace tf::TF_ISA
