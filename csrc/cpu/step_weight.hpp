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

// What finds the largest outputs of a weight (out, in) without computing them all: see head_screen.hpp. Each a value
// for every column of the panels: start: the bias, and -1e38 past the last output; error: |w - w8|, with what rounding
// adds to a product; size: |w8|.
struct HeadChoice {
  Int8Weight screen;  // w8
  const float *start, *error, *size;
  const int64_t* barred;  // outputs that do not count
  int64_t barred_count;
  int64_t* tokens;  // (rows + 1,): what is found, and of how many panels; null: outputs are wanted
};

// Which outputs of a weight are the largest for every row: the first of them, or with `values` the `count` largest log
// softmax outputs, largest first.
struct RowBest {
  float value;
  int32_t index;
};
static inline int64_t best_stride(int64_t rows) { return (rows + 7) / 8 * 8; }  // threads share no line of the cache
struct RowChoice {
  const int64_t* barred;  // outputs that do not count
  int64_t barred_count;
  int64_t count;
  RowBest* best;    // work memory, best_stride(rows) for each thread
  int64_t* tokens;  // (rows, count); null: outputs are wanted
  float* values;    // (rows, count), or null
};

// Floats a row that a product with a weight (in, out) is gathered in: its parts over kSplitDepth inputs each; or that
// its input takes in int8, twice: a product's result may be made into the next one's input beside it.
constexpr int64_t kSplitDepth = 128;
static inline int64_t split_floats(const StepWeight& w) {
  if (w.data && w.layout == WeightLayout::int8) return 2 * (int8_row_floats(w.in, w.group) + 1);
  if (!w.data || w.layout != WeightLayout::columns) return 0;
  return (w.in + kSplitDepth - 1) / kSplitDepth * ((w.out + kPanel - 1) / kPanel * kPanel);
}

}  // namespace tf
