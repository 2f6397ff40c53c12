#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <vector>

#include "check.hpp"

namespace tf {
namespace {

// The kernels divide their work by the number of inputs.
void check_inputs(int64_t in) {
  STD_TORCH_CHECK(in > 0, "transformer_fast: x: wanted at least one input, got none");
}

// Strides of the rows and of the columns of a matrix, one of which is 1.
struct MatrixStrides {
  int64_t row, column;
};
MatrixStrides strides_of(const Tensor& t, const char* name) {
  const MatrixStrides s{t.stride(0), t.size(1) > 1 ? t.stride(1) : 1};
  STD_TORCH_CHECK(s.column == 1 || t.size(0) == 1 || s.row == 1, "transformer_fast: ", name, ": wanted one stride 1");
  return s;
}

void column_sum(Tensor x, Tensor out) {
  const Check check(x);
  check(x, "x").shape({kAny, kAny}).unit();
  check(out, "out").dtype(ScalarType::Float).shape({x.size(1)}).contiguous();
  ColumnSum a{};
  a.dtype = dtype_of(x);
  a.x = read(x);
  a.out = write<float>(out);
  a.rows = x.size(0);
  a.width = x.size(1);
  a.x_stride = x.stride(0);
  kernels().column_sum(a);
}

void to_panels(Tensor weight, Tensor panels) {
  const Check check(weight);
  check(weight, "weight").shape({kAny, kAny});
  check_panels(check(panels, "panels"), weight.size(0), weight.size(1), storage_of(panels));
  ToPanels a{};
  a.dtype = dtype_of(weight);
  a.storage = storage_of(panels);
  a.weight = read(weight);
  a.panels = write(panels);
  a.out = weight.size(0);
  a.in = weight.size(1);
  const MatrixStrides strides = strides_of(weight, "weight");
  a.out_stride = strides.row;
  a.in_stride = strides.column;
#if defined(__linux__)
  // With pages of 4 KiB, address translation would take much of the time of reading a weight.
  const uintptr_t page = uintptr_t(1) << 21, begin = uintptr_t(a.panels);
  const uintptr_t end = begin + size_t(panels.numel() * bytes_of(a.storage));
  const uintptr_t first = (begin + page - 1) & ~(page - 1);
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
  kernels().to_panels(a);
}

void linear_panel(Tensor x, Tensor panels, OptionalTensor bias, int64_t activation, Tensor y) {
  const Check check(x);
  check(x, "x").shape({kAny, kAny}).unit();
  check(y, "y").dtype(x.scalar_type()).shape({x.size(0), kAny}).contiguous();
  check_inputs(x.size(1));
  check_panels(check(panels, "panels"), y.size(1), x.size(1), storage_of(panels));
  check(bias, "bias").dtype(ScalarType::Float).shape({y.size(1)}).contiguous();
  LinearPanel a{};
  a.dtype = dtype_of(x);
  a.storage = storage_of(panels);
  a.x = read(x);
  a.panels = read(panels);
  a.bias = read<float>(bias);
  a.y = write(y);
  a.rows = x.size(0);
  a.in = x.size(1);
  a.out = y.size(1);
  a.x_stride = x.stride(0);
  take_activation(a, activation);
  kernels().linear_panel(a);
}

void linear_rows(Tensor x, std::vector<Tensor> weights, std::vector<OptionalTensor> biases, int64_t activation,
                 std::vector<Tensor> y) {
  STD_TORCH_CHECK(biases.size() == weights.size() && y.size() == weights.size(), "weights, biases, y: wanted as many");
  const Check check(x);
  check(x, "x").dtype(ScalarType::Float).shape({kAny, kAny}).unit();
  check_inputs(x.size(1));
  std::vector<RowsWeight> each;
  for (size_t i = 0; i < weights.size(); ++i) {
    check(weights[i], "weights").dtype(ScalarType::Float).shape({kAny, x.size(1)}).unit();
    const int64_t out = weights[i].size(0);
    check(biases[i], "biases").dtype(ScalarType::Float).shape({out}).contiguous();
    check(y[i], "y").dtype(ScalarType::Float).shape({x.size(0), out}).contiguous();
    each.push_back({read<float>(weights[i]), read<float>(biases[i]), write<float>(y[i]), out, weights[i].stride(0)});
  }
  LinearRows a{};
  a.x = read<float>(x);
  a.rows = x.size(0);
  a.in = x.size(1);
  a.x_stride = x.stride(0);
  a.count = int64_t(each.size());
  a.weights = each.data();
  take_activation(a, activation);
  kernels().linear_rows(a);
}

void linear_long(Tensor x, Tensor weight, OptionalTensor bias, int64_t activation, Tensor y) {
  const Check check(x);
  check(x, "x").dtype(ScalarType::Float).shape({kAny, kAny}).unit();
  check(weight, "weight").dtype(ScalarType::Float).shape({kAny, x.size(1)});
  check(bias, "bias").dtype(ScalarType::Float).shape({weight.size(0)}).contiguous();
  check(y, "y").dtype(ScalarType::Float).shape({x.size(0), weight.size(0)}).contiguous();
  check_inputs(x.size(1));
  if (!y.numel()) return;
  LinearLong a{};
  a.x = read<float>(x);
  a.weight = read<float>(weight);
  a.bias = read<float>(bias);
  a.y = write<float>(y);
  a.rows = x.size(0);
  a.in = x.size(1);
  a.out = weight.size(0);
  a.x_stride = x.stride(0);
  const MatrixStrides strides = strides_of(weight, "weight");
  a.out_stride = strides.row;
  a.in_stride = strides.column;
  take_activation(a, activation);
  kernels().linear_long(a);
}

void linear_bf16(Tensor x, Tensor weight, OptionalTensor bias, int64_t activation, Tensor y) {
  const Check check(x);
  check(x, "x").dtype(ScalarType::BFloat16).shape({kAny, kAny});
  check(weight, "weight").dtype(ScalarType::BFloat16).shape({kAny, x.size(1)});
  check(bias, "bias").dtype(ScalarType::BFloat16).shape({weight.size(0)}).contiguous();
  check(y, "y").dtype(ScalarType::BFloat16).shape({x.size(0), weight.size(0)}).contiguous();
  check_inputs(x.size(1));
  if (!y.numel()) return;
  LinearBf16 a{};
  a.x = read(x);
  a.weight = read(weight);
  a.bias = read(bias);
  a.y = write(y);
  a.rows = x.size(0);
  a.in = x.size(1);
  a.out = weight.size(0);
  const MatrixStrides rows = strides_of(x, "x"), strides = strides_of(weight, "weight");
  a.x_stride = rows.row;
  a.x_in_stride = rows.column;
  a.out_stride = strides.row;
  a.in_stride = strides.column;
  take_activation(a, activation);
  kernels().linear_bf16(a);
}

void weight_gradient(Tensor g, Tensor x, Tensor y, OptionalTensor sums) {
  const Check check(g);
  check(g, "g").dtype(ScalarType::Float).shape({kAny, kAny}).unit();
  check(x, "x").dtype(ScalarType::Float).shape({g.size(0), kAny}).unit();
  check(y, "y").dtype(ScalarType::Float).shape({g.size(1), x.size(1)}).contiguous();
  check(sums, "sums").dtype(ScalarType::Float).shape({g.size(1)}).contiguous();
  check_inputs(x.size(1));
  STD_TORCH_CHECK(g.size(0) > 0, "transformer_fast: g: wanted at least one row, got none");
  if (!y.numel()) return;
  WeightGradient a{};
  a.g = read<float>(g);
  a.x = read<float>(x);
  a.y = write<float>(y);
  a.sums = write<float>(sums);
  a.rows = g.size(0);
  a.out = g.size(1);
  a.in = x.size(1);
  a.g_stride = g.stride(0);
  a.x_stride = x.stride(0);
  kernels().weight_gradient(a);
}

}  // namespace
}  // namespace tf

STABLE_TORCH_LIBRARY_IMPL(transformer_fast, CPU, m) {
  m.impl("cpu_column_sum", TORCH_BOX(&tf::column_sum));
  m.impl("cpu_to_panels", TORCH_BOX(&tf::to_panels));
  m.impl("cpu_linear_panel", TORCH_BOX(&tf::linear_panel));
  m.impl("cpu_linear_rows", TORCH_BOX(&tf::linear_rows));
  m.impl("cpu_linear_long", TORCH_BOX(&tf::linear_long));
  m.impl("cpu_linear_bf16", TORCH_BOX(&tf::linear_bf16));
  m.impl("cpu_weight_gradient", TORCH_BOX(&tf::weight_gradient));
}
