// Weights of a decoding step from tensors.
#pragma once
#include <vector>

#include "cpu/step_weight.hpp"
#include "tensors.hpp"

namespace tf {

using OptionalTensors = std::vector<OptionalTensor>;

// tensors[at]: panels (ceil(out / 32), in, 32), in int8 (ceil(out / 32), in + 4, 32); panels of linear_int8.hpp, int8
// (ceil(out / 32), bytes); or the weight (out, in) with one stride 1. tensors[at + 1]: bias.
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

// screen: int8 panels of w; bounds: (3, 32 * panels); barred: int64; tokens: int64 (rows + 1,). See HeadChoice.
inline HeadChoice choice_of(const StepWeight& w, int64_t rows, const OptionalTensor& screen,
                            const OptionalTensor& bounds, const OptionalTensor& barred, const Tensor& tokens) {
  HeadChoice c{};
  const int64_t panels = (w.out + kPanel - 1) / kPanel;
  STD_TORCH_CHECK(screen.has_value() && bounds.has_value(), "screen, bounds: wanted both with tokens, got none");
  STD_TORCH_CHECK(w.layout == WeightLayout::panels || w.layout == WeightLayout::rows,
                  "weights: wanted the head in panels or with contiguous rows");
  const StepWeight s = weight_of({screen, OptionalTensor()}, 0, w.out, w.in);
  STD_TORCH_CHECK(s.layout == WeightLayout::int8, "screen: wanted int8 panels");
  STD_TORCH_CHECK(bounds->size(0) == 3 && bounds->size(1) == panels * kPanel, "bounds: wanted shape (3, ",
                  panels * kPanel, ")");
  STD_TORCH_CHECK(tokens.numel() == rows + 1, "tokens: wanted ", rows + 1, " values");
  c.screen = Int8Weight{static_cast<const int8_t*>(s.data), nullptr, s.out, s.in, s.group};
  c.start = read<float>(*bounds);
  c.error = c.start + panels * kPanel;
  c.size = c.error + panels * kPanel;
  c.barred = read<int64_t>(barred);
  c.barred_count = barred.has_value() ? barred->numel() : 0;
  c.tokens = write<int64_t>(tokens);
  return c;
}

inline int64_t bytes_of(const StepWeight& w) { return w.out * w.in * bytes_of(w.storage); }

}  // namespace tf
