// Sums over rows (gradients of weights and biases) that do not depend on the number of threads: the chunks of rows
// depend only on the number of rows, each has its own partial sums, and those are added up in a fixed order.
#pragma once
#include "parallel.hpp"
#include "simd.hpp"

namespace tf::TF_ISA {

// N sums (width,) into out[0..N); a null out[i] is skipped.
template <int N>
class ColumnSums {
 public:
  ColumnSums(int64_t rows, int64_t width, float* const (&out)[N]) : rows_(rows), width_(width) {
    for (int i = 0; i < N; ++i) {
      out_[i] = out[i];
      wanted_ += out[i] != nullptr;
    }
    chunk_ = (rows + kMostChunks - 1) / kMostChunks;
    chunk_ = chunk_ <= kRun ? kRun : (chunk_ + kRun - 1) / kRun * kRun;
    count_ = (rows + chunk_ - 1) / chunk_;
  }

  // rows(begin, end, into) adds rows [begin, end) to into[0..N). It is called in parallel, for at most kRun rows, so
  // that no running sum grows long. grain: rows that are worth a thread.
  template <class Rows>
  void run(int64_t grain, const Rows& rows) const {
    const int64_t stride = (width_ + 15) / 16 * 16, row = stride * wanted_;
    float* partials = wanted_ ? scratch<float>(1, count_ * row) : nullptr;
    parallel_for(count_, (grain + chunk_ - 1) / chunk_, [&](int64_t first, int64_t last) {
      float* run_sums = wanted_ ? scratch<float>(2, row) : nullptr;
      for (int64_t chunk = first; chunk < last; ++chunk) {
        const int64_t begin = chunk * chunk_, end = begin + chunk_ < rows_ ? begin + chunk_ : rows_;
        float* total = partials + chunk * row;
        for (int64_t r = begin; r < end; r += kRun) {
          float *target = r == begin ? total : run_sums, *into[N];
          for (int i = 0, k = 0; i < N; ++i) into[i] = out_[i] ? target + stride * k++ : nullptr;
          if (wanted_) __builtin_memset(target, 0, size_t(row) * sizeof(float));
          rows(r, r + kRun < end ? r + kRun : end, into);
          if (wanted_ && target != total)
            for (int64_t c = 0; c < row; c += kWidth) store(total + c, load(total + c) + load(run_sums + c));
        }
      }
    });
    for (int i = 0, k = 0; i < N; ++i)
      if (out_[i]) finish(partials + stride * k++, row, out_[i]);
  }

 private:
  static constexpr int64_t kMostChunks = 64, kRun = 32;

  // out[c] = sum over chunks of partials[chunk * row + c], as eight interleaved running sums.
  void finish(const float* partials, int64_t row, float* out) const {
    parallel_for(width_, 256 + 32768 / (count_ + 1), [&](int64_t begin, int64_t end) {
      for_columns(end - begin, [&](int64_t i, auto part) {
        const float* p = partials + begin + i;
        Vec s[8] = {};
        for (int64_t chunk = 0; chunk < count_; chunk += 8)
          for (int k = 0; k < 8 && chunk + k < count_; ++k) s[k] = s[k] + load(p + (chunk + k) * row, part);
        store(out + begin + i, ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7])), part);
      });
    });
  }

  int64_t rows_, width_, chunk_, count_;
  int wanted_ = 0;
  float* out_[N];
};

}  // namespace tf::TF_ISA
