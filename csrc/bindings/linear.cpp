#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <vector>

#include "tensors.hpp"

namespace tf {
namespace {

void column_sum(Tensor x, Tensor out) {
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
  ToPanels a{};
  a.dtype = dtype_of(weight);
  a.storage = storage_of(panels);
  a.weight = read(weight);
  a.panels = write(panels);
  a.out = weight.size(0);
  a.in = weight.size(1);
  a.out_stride = weight.stride(0);
  a.in_stride = weight.size(1) > 1 ? weight.stride(1) : 1;
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
  a.has_activation = activation >= 0;
  a.activation = Activation(activation >= 0 ? activation : 0);
  kernels().linear_panel(a);
}

void linear_rows(Tensor x, std::vector<Tensor> weights, std::vector<OptionalTensor> biases, int64_t activation,
                 std::vector<Tensor> y) {
  STD_TORCH_CHECK(biases.size() == weights.size() && y.size() == weights.size(), "weights, biases, y: wanted as many");
  std::vector<RowsWeight> each;
  for (size_t i = 0; i < weights.size(); ++i)
    each.push_back({read<float>(weights[i]), read<float>(biases[i]), write<float>(y[i]), weights[i].size(0),
                    weights[i].stride(0)});
  LinearRows a{};
  a.x = read<float>(x);
  a.rows = x.size(0);
  a.in = x.size(1);
  a.x_stride = x.stride(0);
  a.count = int64_t(each.size());
  a.weights = each.data();
  a.has_activation = activation >= 0;
  a.activation = Activation(activation >= 0 ? activation : 0);
  kernels().linear_rows(a);
}

void linear_long(Tensor x, Tensor weight, OptionalTensor bias, int64_t activation, Tensor y) {
  LinearLong a{};
  a.x = read<float>(x);
  a.weight = read<float>(weight);
  a.bias = read<float>(bias);
  a.y = write<float>(y);
  a.rows = x.size(0);
  a.in = x.size(1);
  a.out = weight.size(0);
  a.x_stride = x.stride(0);
  a.out_stride = weight.stride(0);
  a.in_stride = weight.stride(1);
  a.has_activation = activation >= 0;
  a.activation = Activation(activation >= 0 ? activation : 0);
  kernels().linear_long(a);
}

void weight_gradient(Tensor g, Tensor x, Tensor y, OptionalTensor sums) {
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
  m.impl("cpu_weight_gradient", TORCH_BOX(&tf::weight_gradient));
}
