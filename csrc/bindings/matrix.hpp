#pragma once
#include "tensors.hpp"

namespace tf {

// A tensor as a matrix. It is 2-D with last stride 1, or contiguous with any number of dimensions.
struct Matrix {
  int64_t rows, width, stride;
};

inline Matrix matrix_of(const Tensor& t) {
  const int64_t dims = t.dim();
  if (dims == 2) return {t.size(0), t.size(1), t.stride(0)};
  const int64_t width = t.size(dims - 1);
  return {width ? int64_t(t.numel()) / width : 0, width, width};
}
inline int64_t row_stride(const OptionalTensor& t) { return t.has_value() ? matrix_of(*t).stride : 0; }

}  // namespace tf
