// A weight of a decoding step from the tensor that holds it.
#pragma once
#include <vector>

#include "cpu/step_weight.hpp"
#include "tensors.hpp"

namespace tf {

using OptionalTensors = std::vector<OptionalTensor>;

// tensors[at]: panels (ceil(out / 32), in, 32), in int8 (ceil(out / 32), in + 4, 32), or the weight (out, in) with one stride 1; tensors[at + 1]: bias
// int8 of two dimensions: the panels of linear_int8.hpp, (ceil(out / 32), bytes).
inline StepWeight weight_of(const OptionalTensors& tensors, size_t at, int64_t out, int64_t in) {
  StepWeight w{};
  if (!tensors[at].has_value()) return w;
  const Tensor& t = *tensors[at];
  w.storage = storage_of(t);
  w.data = read(t);
  w.bias = read<float>(tensors[at + 1]);
  if (t.dim() == 2 && w.storage == Storage::i8) {
    w.layout = WeightLayout::int8;
    w.out = out;
    w.in = in;
    for (w.group = kInt8Group; w.group > 32 && int8_panel_bytes(in, w.group) < t.size(1);) w.group /= 2;
    STD_TORCH_CHECK(int8_panel_bytes(in, w.group) == t.size(1) && t.size(0) == (out + kPanel - 1) / kPanel,
                    "weight: wanted the int8 panels of a weight (", out, ", ", in, ")");
    return w;
  }
  w.in = t.size(1);
  if (t.dim() == 3) {
    w.out = out;
    if (w.storage == Storage::i8) w.in -= kScaleSlots / kPanel;
    return w;
  }
  w.out = t.size(0);
  w.layout = w.in == 1 || t.stride(1) == 1 ? WeightLayout::rows : WeightLayout::columns;
  w.stride = t.stride(w.layout == WeightLayout::rows ? 0 : 1);
  STD_TORCH_CHECK(w.layout == WeightLayout::rows || w.out == 1 || t.stride(0) == 1, "weight: wanted one stride 1");
  return w;
}

inline int64_t bytes_of(const StepWeight& w) { return w.out * w.in * bytes_of(w.storage); }

}  // namespace tf
