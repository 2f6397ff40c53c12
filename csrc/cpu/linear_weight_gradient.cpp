// The gradient of a weight, y = g^T x. Both operands are copied, a stretch of rows at a time: a range of g's columns
// (A of the products) once, and 64 columns of x (a panel in the L1 cache) once per such range. No running sum exceeds
// kDepth terms before it is added to the total, as in linear_long.cpp.
#include "attention_gemm.hpp"
#include "attention_tile.hpp"
#include "kernels.hpp"
#include "parallel.hpp"

namespace tf::TF_ISA {
namespace {

constexpr int64_t kColumns = 64, kDepth = 128, kStrip = 48, kMostStrips = 10;
constexpr int64_t kShort = 32;  // rows per running sum of g itself

int64_t parts_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

class Item {
 public:
  explicit Item(const WeightGradient& a) : a_(a), run_(round_up(parts_of(a.rows, parts_of(a.rows, kDepth)), 16)) {
    strips_ = scratch<float>(0, kMostStrips * kStrip * kDepth);
    panel_ = scratch<float>(1, kColumns * kDepth);
    ragged_ = scratch<float>(2, kMostStrips * kStrip * kColumns);
    sums_ = scratch<float>(3, 2 * kMostStrips * kStrip);
  }

  // Columns [n, n + wide) of g, at most kMostStrips strips, and [k, k + deep) of x; k is a multiple of kColumns.
  void run(int64_t n, int64_t wide, int64_t k, int64_t deep) {
    const bool summed = a_.sums && !k;
    if (summed) __builtin_memset(sums_, 0, size_t(kMostStrips * kStrip) * sizeof(float));
    for (int64_t row = 0; row < a_.rows; row += run_) {
      const int64_t rows = least(run_, a_.rows - row);
      const float* g = a_.g + row * a_.g_stride + n;
      for (int64_t s = 0; s < wide; s += kStrip)
        load_rows(g + s, a_.g_stride, rows, least(kStrip, wide - s), strips_ + s * kDepth, kStrip);
      if (summed) add_rows(rows, wide);
      for (int64_t c = k; c < k + deep; c += kColumns) multiply(n, wide, c, least(kColumns, k + deep - c), row, rows);
    }
    if (summed) __builtin_memcpy(a_.sums + n, sums_, size_t(wide) * sizeof(float));
    const int64_t rest = (k + deep) % kColumns % kWidth, width = (k + deep) % kColumns, c = k + deep - width;
    for (int64_t i = 0; rest && i < wide; ++i)
      __builtin_memcpy(a_.y + (n + i) * a_.in + c, ragged_ + i * kColumns, size_t(width) * sizeof(float));
  }

 private:
  void add_rows(int64_t rows, int64_t wide) {
    float* run = sums_ + kMostStrips * kStrip;
    for (int64_t s = 0; s < wide; s += kStrip)
      for (int64_t first = 0; first < rows; first += kShort) {
        const float* from = strips_ + s * kDepth;
        for (int64_t c = 0; c < kStrip; c += kWidth) {
          Vec sum = {};
          for (int64_t r = first; r < least(first + kShort, rows); ++r) sum = sum + load(from + r * kStrip + c);
          store(run + c, sum);
        }
        for (int64_t c = 0; c < kStrip; c += kWidth) store(sums_ + s + c, load(sums_ + s + c) + load(run + c));
      }
  }

  void multiply(int64_t n, int64_t wide, int64_t c, int64_t columns, int64_t row, int64_t rows) {
    load_rows(a_.x + row * a_.x_stride + c, a_.x_stride, rows, columns, panel_, kColumns);
    const bool in_place = columns % kWidth == 0;  // whole vectors are summed in y itself
    float* y = in_place ? a_.y + n * a_.in + c : ragged_;
    const int64_t ld = in_place ? a_.in : kColumns;
    for (int64_t s = 0; s < wide; s += kStrip)
      gemm(row ? Write::kAdd : Write::kStore, least(kStrip, wide - s), round_up(columns, kWidth), rows,
           {strips_ + s * kDepth, 4, kStrip * 4}, panel_, kColumns, y + s * ld, ld, nullptr, kDepth);
  }

  const WeightGradient& a_;
  const int64_t run_;
  float *strips_, *panel_, *ragged_, *sums_;
};

}  // namespace

void weight_gradient(const WeightGradient& a) {
  const int64_t threads = tf_num_threads(), strips = parts_of(a.out, kStrip), panels = parts_of(a.in, kColumns);
  // Ranges are as wide as possible, as x is copied once per range, but leave enough items for all threads.
  int64_t ranges = parts_of(strips, kMostStrips);
  const int64_t cuts = least(parts_of(4 * threads, ranges), parts_of(panels, 4));
  if (ranges * cuts < 4 * threads) ranges = least(strips, parts_of(4 * threads, cuts));
  const double work = double(a.rows) * double(a.out) * double(a.in);
  share_out(ranges * cuts, work < 1e5 ? 1 : threads, [&] {
    return [&a, item = Item(a), strips, panels, ranges, cuts](int64_t i) mutable {
      const int64_t range = i / cuts, cut = i % cuts;
      const int64_t n = strips * range / ranges * kStrip, n_end = least(strips * (range + 1) / ranges * kStrip, a.out);
      const int64_t k = panels * cut / cuts * kColumns, k_end = least(panels * (cut + 1) / cuts * kColumns, a.in);
      item.run(n, n_end - n, k, k_end - k);
    };
  });
}

}  // namespace tf::TF_ISA
