#pragma once
#include "check.hpp"

namespace tf {

// A tensor as a matrix. It is 2-D with last stride 1, or contiguous with any number of dimensions.
struct Matrix {
  int64_t rows, width, stride;
};

inline Matrix matrix_of(const Checked& check, const Tensor& t) {
  const int64_t dims = t.dim();
  if (dims == 2) {
    check.unit();
    return {t.size(0), t.size(1), t.stride(0)};
  }
  check.contiguous();
  const int64_t width = dims ? t.size(dims - 1) : 1;
  return {width ? int64_t(t.numel()) / width : 0, width, width};
}

// The arguments of a kernel over rows, all on one device and of the dtype and shape of the first.
class RowArguments {
 public:
  RowArguments(const Tensor& first, const char* name)
      : check_(first), matrix_(matrix_of(check_(first, name), first)), dtype_(first.scalar_type()) {}

  const Check& check() const { return check_; }
  const Matrix& matrix() const { return matrix_; }
  ScalarType dtype() const { return dtype_; }

  // The stride of another matrix of the same shape; 0 for none.
  int64_t stride(const OptionalTensor& t, const char* name) const {
    if (!t.has_value()) return 0;
    const Checked checked = check_(*t, name).dtype(dtype_);
    const Matrix m = matrix_of(checked, *t);
    if (m.rows != matrix_.rows || m.width != matrix_.width) checked.shape({matrix_.rows, matrix_.width});
    return m.stride;
  }
  // A contiguous result of the same shape.
  void result(const OptionalTensor& t, const char* name) const {
    check_(t, name).dtype(dtype_).numel(matrix_.rows * matrix_.width).contiguous();
  }
  // float32, one value per row.
  void per_row(const OptionalTensor& t, const char* name) const {
    check_(t, name).dtype(ScalarType::Float).numel(matrix_.rows).contiguous();
  }
  // float32 or `other`, one value per column.
  void per_column(const OptionalTensor& t, const char* name, ScalarType other = ScalarType::Float) const {
    check_(t, name).float_or(other).numel(matrix_.width).contiguous();
  }

 private:
  const Check check_;
  const Matrix matrix_;
  const ScalarType dtype_;
};

}  // namespace tf
