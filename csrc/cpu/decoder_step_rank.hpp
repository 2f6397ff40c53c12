// The largest log softmax outputs of a row, in three passes over a row that is in the cache.
#pragma once
#include "step_products.hpp"

namespace tf::TF_ISA {

constexpr int64_t kRankBlock = 256;  // columns per block

// Whether a ranks before b: it is larger, or equal and has the smaller index.
static inline bool before(const RowBest& a, const RowBest& b) {
  return above(a.value, b.value) || (!above(b.value, a.value) && a.index < b.index);
}

// x (n,): the row's logits, which are overwritten. Barred ones count in the softmax and are set to -infinity after it.
static void rank(const RowChoice& c, float* x, int64_t n, int64_t row) {
  const int64_t blocks = (n + kRankBlock - 1) / kRankBlock;
  float* tops = scratch<float>(0, blocks);
  const auto width = [&](int64_t b) { return n - b * kRankBlock < kRankBlock ? n - b * kRankBlock : kRankBlock; };
  const auto top_of = [&](int64_t b) {
    Vec most = broadcast(-INFINITY);
    const float* block = x + b * kRankBlock;
    for_columns(width(b), [&](int64_t i, auto part) { most = max(load(block + i, part, -INFINITY), most); });
    return max_of(most);
  };
  float top = -INFINITY;
  for (int64_t b = 0; b < blocks; ++b) {
    tops[b] = top_of(b);
    top = tops[b] > top ? tops[b] : top;
  }
  double total = 0.;
  for (int64_t b = 0; b < blocks; ++b)
    total += sum(sum_columns(width(b), [&](int64_t i, auto part) {
      return exp(load(x + b * kRankBlock + i, part, -INFINITY) - top);
    }));
  const float shift = float(__builtin_log(total));
  for (int64_t i = 0; i < c.barred_count; ++i) {
    if (c.barred[i] < 0 || c.barred[i] >= n) continue;
    x[c.barred[i]] = -INFINITY;
    tops[c.barred[i] / kRankBlock] = top_of(c.barred[i] / kRankBlock);
  }
  const bool odd = !(total > 0. && total < 1e300);  // the maxima may then hide NaN: look at every value
  RowBest* best = scratch<RowBest>(1, c.count);
  for (int64_t i = 0; i < c.count; ++i) best[i] = {-INFINITY, INT32_MAX};
  RowBest& last = best[c.count - 1];
  for (int64_t b = 0; b < blocks; ++b) {
    if (tops[b] < last.value && !odd) continue;
    for (int64_t i = b * kRankBlock; i < b * kRankBlock + width(b); ++i) {
      if (x[i] < last.value) continue;
      const RowBest next{x[i], int32_t(i)};
      if (!before(next, last)) continue;
      int64_t at = c.count - 1;
      for (; at > 0 && before(next, best[at - 1]); --at) best[at] = best[at - 1];
      best[at] = next;
    }
  }
  for (int64_t i = 0; i < c.count; ++i) {
    c.values[row * c.count + i] = best[i].value - top - shift;
    c.tokens[row * c.count + i] = best[i].index;
  }
}

}  // namespace tf::TF_ISA
