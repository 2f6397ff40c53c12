// y = act(x W^T + b) for many rows of x in bfloat16, by matrix tiles (AMX).
//
// Both factors are laid out as tiles first, so that the tiles of a sum are one stream of memory: x once, the weight a
// block at a time, into memory that the L2 cache holds. A unit is 48 rows by 32 columns: six sums, for which seven
// tiles are read per six products. Inputs past kDepth steps are a further part, and sums of a part are kept as floats.
// Bias, activation and rounding follow the last part's sums while they are in the L1 cache.
#pragma once
#include "linear_bf16_tiles.hpp"

#if defined(TF_TILES)
namespace tf::TF_ISA {

// x as tiles: per 16 rows, tiles of 32 inputs one after the other, with zeros for what is missing.
class TiledRows {
 public:
  explicit TiledRows(const LinearBf16& l) : steps((l.in + kStep - 1) / kStep) {
    const int64_t strips = (l.rows + kTileRows - 1) / kTileRows;
    float* const to = scratch<float>(3, strips * steps * kTile);
    tiles_ = to;
    if (l.x_in_stride == 1)
      parallel_for(strips, 1 + 64 / steps, [&](int64_t begin, int64_t end) {
        for (int64_t s = begin; s < end; ++s) by_rows(l, s, to + s * steps * kTile);
      });
    else
      parallel_for((strips + 1) / 2, 1 + 32 / steps, [&](int64_t begin, int64_t end) {
        for (int64_t s = begin; s < end; ++s) by_inputs(l, 2 * s, strips, to + 2 * s * steps * kTile);
      });
  }
  const float* at(int64_t row, int64_t step) const { return tiles_ + (row / kTileRows * steps + step) * kTile; }

  const int64_t steps;  // tiles per 16 rows

 private:
  void by_rows(const LinearBf16& l, int64_t strip, float* to) const {
    const bf16* x = static_cast<const bf16*>(l.x) + strip * kTileRows * l.x_stride;
    const int64_t rows = least(kTileRows, l.rows - strip * kTileRows), whole = l.in / kStep;
    for (int64_t r = 0; r < kTileRows; ++r, x += l.x_stride, to += kTileRows) {
      const int64_t count = r < rows ? whole : 0;
      for (int64_t s = 0; s < count; ++s) __builtin_memcpy(to + s * kTile, x + s * kStep, kTileBytes);
      for (int64_t s = count; s < steps; ++s) __builtin_memset(to + s * kTile, 0, kTileBytes);
      if (r < rows && whole < steps)
        __builtin_memcpy(to + whole * kTile, x + whole * kStep, size_t(l.in - whole * kStep) * sizeof(bf16));
    }
  }
  // One input of all rows lies side by side: two strips at a time.
  void by_inputs(const LinearBf16& l, int64_t strip, int64_t strips, float* to) const {
    const bf16* x = static_cast<const bf16*>(l.x) + strip * kTileRows;
    const int64_t rows = least(2 * kTileRows, l.rows - strip * kTileRows);
    alignas(64) float both[2][kTile] = {};
    for (int64_t s = 0; s < steps; ++s, x += kStep * l.x_in_stride, to += kTile) {
      const int64_t inputs = least(kStep, l.in - s * kStep);
      if (inputs < kStep) __builtin_memset(both, 0, sizeof both);
      pair_rows_transposed(x, l.x_in_stride, inputs, rows, both[0], kTileRows);
      __builtin_memcpy(to, both[0], sizeof both[0]);
      if (strip + 1 < strips) __builtin_memcpy(to + steps * kTile, both[1], sizeof both[1]);
    }
  }

  const float* tiles_;
};

// What one task computes: rows [begin, end) by columns [first, first + 32 panels).
class ManyRows {
 public:
  template <class Act>
  static void run(const LinearBf16& l) {
    const int64_t most = round_up(kRowBytes / (2 * l.in) + 1, 4 * kUnitRows);
    for (int64_t row = 0; row < l.rows; row += most) {
      LinearBf16 part = l;
      part.x = static_cast<const bf16*>(l.x) + row * l.x_stride;
      part.y = static_cast<bf16*>(l.y) + row * l.out;
      part.rows = least(most, l.rows - row);
      rows<Act>(part);
    }
  }

 private:
  static constexpr int64_t kUnitRows = 3 * kTileRows;
  static constexpr int64_t kDepth = 32;          // steps per part, at most
  static constexpr int64_t kBlock = 512 * 1024;  // bytes of laid out weight per block, about
  static constexpr int64_t kRowBytes = 8 << 20;  // of x that is laid out at a time: scratch memory is kept

  template <class Act>
  static void rows(const LinearBf16& l) {
    const TiledRows x(l);
    const int64_t threads = tf_num_threads(), panels = (l.out + kPanel - 1) / kPanel;
    const int64_t most = kBlock / (least(x.steps, kDepth) * 2 * kTileRows * kTileBytes) + 1;
    int64_t blocks = (panels + most - 1) / most;
    blocks = least(round_up(blocks, threads), panels);
    const int64_t each = (panels + blocks - 1) / blocks;
    blocks = (panels + each - 1) / each;
    // Few columns for many threads: the rows are divided too, and each piece lays the weight out again.
    int64_t pieces = blocks < threads ? threads / blocks : 1;
    const int64_t share = round_up((l.rows + pieces - 1) / pieces, kUnitRows);
    pieces = (l.rows + share - 1) / share;
    parallel_for(blocks * pieces, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t panel = i / pieces * each, row = i % pieces * share;
        ManyRows(l, x, panel * kPanel, least(each, panels - panel), row, least(l.rows, row + share)).multiply<Act>();
      }
    });
  }

  // Up to 48 rows by all columns.
  struct Unit {
    const float *x, *weight;
    float* sums;  // kept between parts; null if there is one
    int64_t row, rows, steps;
    bool add, last;
  };

  ManyRows(const LinearBf16& l, const TiledRows& x, int64_t first, int64_t panels, int64_t begin, int64_t end)
      : l_(l), x_(x), first_(first), panels_(panels), begin_(begin), end_(end),
        parts_((x.steps + kDepth - 1) / kDepth), depth_((x.steps + parts_ - 1) / parts_) {}

  template <class Act>
  void multiply() const {
    float* const weight = scratch<float>(0, panels_ * 2 * depth_ * kTile);
    float* const sums = parts_ > 1 ? scratch<float>(1, round_up(end_ - begin_, kTileRows) * panels_ * kPanel) : nullptr;
    const Tiles tiles;
    for (int64_t part = 0; part < parts_; ++part) {
      const int64_t from = part * depth_, steps = least(depth_, x_.steps - from);
      lay_out(from, steps, weight);
      for (int64_t row = begin_; row < end_; row += kUnitRows) {
        const Unit u{x_.at(row, from), weight, sums ? sums + (row - begin_) * panels_ * kPanel : nullptr, row,
                     least(kUnitRows, end_ - row), steps, part > 0, part + 1 == parts_};
        if (u.rows > 2 * kTileRows)
          columns<3, Act>(u);
        else if (u.rows > kTileRows)
          columns<2, Act>(u);
        else
          columns<1, Act>(u);
      }
    }
  }

  // The weight in strips of 16 columns, each (16 steps, 16) words of two inputs, with zeros for what is missing.
  void lay_out(int64_t from, int64_t steps, float* to) const {
    const int64_t count = least(steps * kStep, l_.in - from * kStep), words = (count + 1) / 2, strip = steps * kTile;
    const bf16* weight = static_cast<const bf16*>(l_.weight) + from * kStep * l_.in_stride;
    for (int64_t p = 0; p < panels_; ++p)
      for (int64_t half = 0; half < 2; ++half, to += strip) {
        const int64_t column = first_ + p * kPanel + half * kTileRows, left = l_.out - column;
        const int64_t columns = left < 0 ? 0 : left;
        const bf16* from_column = weight + (columns ? column * l_.out_stride : 0);
        if (l_.in_stride == 1)
          load_pairs_transposed(from_column, l_.out_stride, columns, count, to, kTileRows);
        else if (!half)
          pair_inputs(from_column, least(columns, kPanel), count, to, to + strip);
        __builtin_memset(to + words * kTileRows, 0, size_t(strip - words * kTileRows) * sizeof(float));
      }
  }
  // One input of all columns lies side by side: both strips of a panel at a time.
  void pair_inputs(const bf16* weight, int64_t columns, int64_t count, float* to, float* second) const {
    for (int64_t k = 0; k < count; k += 2, weight += 2 * l_.in_stride)
      for (int64_t c = 0; c < kPanel; c += 2 * kWidth) {
        const Halves even = bit_cast<Halves>(load_words(weight + c, columns - c));
        const Halves odd = bit_cast<Halves>(load_words(weight + (k + 1 < count ? l_.in_stride + c : 0),
                                                       k + 1 < count ? columns - c : 0));
        for (int64_t i = 0; i < 2; ++i) {
          const int64_t at = c + i * kWidth;
          float* const into = at < kTileRows ? to + at : second + at - kTileRows;
          store(into + k / 2 * kTileRows, interleave(even, odd, i * kWidth));
        }
      }
  }

  template <int T, class Act>
  void columns(const Unit& u) const {
    alignas(64) float own[T * kTileRows * kPanel];
    for (int64_t p = 0; p < panels_; ++p) {
      float* sums = u.sums ? u.sums + p * T * kTileRows * kPanel : own;
      products<T>(u, u.weight + p * 2 * u.steps * kTile, sums);
      if (u.last) finish<Act>(u, first_ + p * kPanel, sums);
    }
  }

  // T tiles of rows by two strips of columns. sums: (16 T, 32).
  template <int T>
  void products(const Unit& u, const float* b, float* sums) const {
    constexpr int64_t kRow = kPanel * int64_t(sizeof(float)), kDown = kTileRows * kPanel;
    if (u.add) {
      tile_load<0>(sums, kRow), tile_load<1>(sums + kTileRows, kRow);
      if (T > 1) tile_load<2>(sums + kDown, kRow), tile_load<3>(sums + kDown + kTileRows, kRow);
      if (T > 2) tile_load<4>(sums + 2 * kDown, kRow), tile_load<5>(sums + 2 * kDown + kTileRows, kRow);
    } else {
      tile_zero<0>(), tile_zero<1>();
      if (T > 1) tile_zero<2>(), tile_zero<3>();
      if (T > 2) tile_zero<4>(), tile_zero<5>();
    }
    const float* a = u.x;
    for (int64_t s = 0; s < u.steps; ++s, a += kTile, b += kTile) step<T>(a, b, b + u.steps * kTile);
    tile_store<0>(sums, kRow), tile_store<1>(sums + kTileRows, kRow);
    if (T > 1) tile_store<2>(sums + kDown, kRow), tile_store<3>(sums + kDown + kTileRows, kRow);
    if (T > 2) tile_store<4>(sums + 2 * kDown, kRow), tile_store<5>(sums + 2 * kDown + kTileRows, kRow);
  }

  template <int T>
  void step(const float* first, const float* b, const float* b2) const {
    const float *second = first + x_.steps * kTile, *third = second + x_.steps * kTile;
    tile_load<6>(b, kTileBytes);
    tile_load<7>(first, kTileBytes);
    tile_multiply_bf16<0, 7, 6>();
    if constexpr (T == 1) {
      tile_load<6>(b2, kTileBytes);
      tile_multiply_bf16<1, 7, 6>();
    } else if constexpr (T == 2) {
      tile_load<5>(second, kTileBytes);
      tile_multiply_bf16<2, 5, 6>();
      tile_load<4>(b2, kTileBytes);
      tile_multiply_bf16<3, 5, 4>();
      tile_multiply_bf16<1, 7, 4>();
    } else {
      tile_load<7>(second, kTileBytes);
      tile_multiply_bf16<2, 7, 6>();
      tile_load<7>(third, kTileBytes);
      tile_multiply_bf16<4, 7, 6>();
      tile_load<6>(b2, kTileBytes);
      tile_multiply_bf16<5, 7, 6>();
      tile_load<7>(first, kTileBytes);
      tile_multiply_bf16<1, 7, 6>();
      tile_load<7>(second, kTileBytes);
      tile_multiply_bf16<3, 7, 6>();
    }
  }

  template <class Act>
  void finish(const Unit& u, int64_t column, const float* sums) const {
    constexpr int64_t kVectors = kPanel / kWidth;
    const int64_t columns = l_.out - column;
    Vec bias[kVectors] = {};
    if (l_.bias)
      for (int64_t i = 0; i < kVectors; ++i)
        bias[i] = load_some(static_cast<const bf16*>(l_.bias) + column + i * kWidth, columns - i * kWidth);
    bf16* y = static_cast<bf16*>(l_.y) + u.row * l_.out + column;
    for (int64_t r = 0; r < u.rows; ++r, y += l_.out, sums += kPanel)
#pragma GCC unroll 8
      for (int64_t i = 0; i < kVectors; ++i)
        if (columns > i * kWidth)
          store_some(y + i * kWidth, Act::apply(load(sums + i * kWidth) + bias[i]), columns - i * kWidth);
  }

  const LinearBf16& l_;
  const TiledRows& x_;
  const int64_t first_, panels_, begin_, end_, parts_, depth_;
};

}  // namespace tf::TF_ISA
#endif
