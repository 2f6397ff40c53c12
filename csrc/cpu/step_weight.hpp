// A weight in one of the layouts that a decoding step reads.
#pragma once
#include "kernels_int8.hpp"

namespace tf {

enum class WeightLayout {
  panels,   // (ceil(out / 32), in, 32), see linear.hpp
  rows,     // (out, in)
  columns,  // (in, out)
  int8,     // panels of linear_int8.hpp, for int8 arithmetic
};

struct StepWeight {  // y = x W^T + bias; absent when data is null
  Storage storage;  // i8: only with panels or int8
  WeightLayout layout;
  const void* data;
  const float* bias;
  int64_t out, in, stride;  // stride: between rows or columns
  int64_t group;            // of int8
};

// To find the largest outputs of a weight (out, in) without computing all of them: see head_screen.hpp. start, error
// and size have one value per column of the panels. start: the bias, -1e38 past the last output; error: |w - w8| and a
// margin for the rounding of a product; size: |w8|.
struct HeadChoice {
  Int8Weight screen;  // w8
  const float *start, *error, *size;
  const int64_t* barred;  // outputs that do not count
  int64_t barred_count;
  int64_t* tokens;  // (rows + 1,): the largest per row, then how many panels were computed; null: outputs are wanted
};

// To find the largest outputs of a weight per row: the first of the largest, or with `values` the `count` largest log
// softmax outputs, in descending order.
struct RowBest {
  float value;
  int32_t index;
};
static inline int64_t best_stride(int64_t rows) { return (rows + 7) / 8 * 8; }  // threads share no cache line
struct RowChoice {
  const int64_t* barred;  // outputs that do not count
  int64_t barred_count;
  int64_t count;
  RowBest* best;    // scratch, best_stride(rows) per thread
  int64_t* tokens;  // (rows, count); null: outputs are wanted
  float* values;    // (rows, count), or null
};

// Scratch floats per row for a product. Weight (in, out): partial sums over every kSplitDepth inputs. int8: its
// quantised input, twice, as the result of a product may be quantised for the next one at the same time.
constexpr int64_t kSplitDepth = 128;
static inline int64_t split_floats(const StepWeight& w) {
  if (w.data && w.layout == WeightLayout::int8) return 2 * (int8_row_floats(w.in, w.group) + 1);
  if (!w.data || w.layout != WeightLayout::columns) return 0;
  return (w.in + kSplitDepth - 1) / kSplitDepth * ((w.out + kPanel - 1) / kPanel * kPanel);
}

}  // namespace tf
