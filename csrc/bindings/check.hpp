// Checks of the tensors of a call. Python has checked what its own callers pass; these are for calls of the ops of
// torch.ops.transformer_fast themselves, which must raise an error, never read or write outside a tensor.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <string>

#include "cpu/activation.hpp"
#include "tensors.hpp"

namespace tf {

constexpr int64_t kAny = INT64_MIN;  // in a shape: any size

// One tensor, or none: each function raises an error that names the argument unless the tensor is as wanted.
class Checked {
 public:
  Checked(const Tensor* t, const char* name) : t_(t), name_(name) {}

  const Checked& shape(std::initializer_list<int64_t> wanted) const {
    if (!t_) return *this;
    const auto sizes = t_->sizes();
    bool same = sizes.size() == wanted.size();
    size_t i = 0;
    for (const int64_t n : wanted) {
      same = same && (n == kAny || sizes[i] == n);
      ++i;
    }
    if (!same) refuse("shape " + text_of(wanted), "shape " + text_of(sizes));
    return *this;
  }
  const Checked& shape_of(const Tensor& other) const {
    if (!t_) return *this;
    const auto sizes = t_->sizes(), wanted = other.sizes();
    bool same = sizes.size() == wanted.size();
    for (size_t i = 0; same && i < sizes.size(); ++i) same = sizes[i] == wanted[i];
    if (!same) refuse("shape " + text_of(wanted), "shape " + text_of(sizes));
    return *this;
  }
  const Checked& numel(int64_t wanted) const {
    if (t_ && int64_t(t_->numel()) != wanted)
      refuse(std::to_string(wanted) + " values", std::to_string(int64_t(t_->numel())));
    return *this;
  }
  const Checked& dtype(ScalarType wanted) const {
    if (t_ && t_->scalar_type() != wanted) refuse(name_of(wanted), name_of(t_->scalar_type()));
    return *this;
  }
  // float32 or, if it differs, `other`.
  const Checked& float_or(ScalarType other) const {
    if (t_ && t_->scalar_type() != other) dtype(ScalarType::Float);
    return *this;
  }
  const Checked& contiguous() const {
    if (t_ && !t_->is_contiguous()) refuse("a contiguous tensor", "strides " + text_of(t_->strides()));
    return *this;
  }
  // For results: elements of an expanded tensor share memory, and threads would write it at once.
  const Checked& unshared() const {
    if (!t_) return *this;
    const auto sizes = t_->sizes(), strides = t_->strides();
    for (size_t i = 0; i < sizes.size(); ++i)
      if (sizes[i] > 1 && strides[i] == 0) refuse("elements that share no memory", "strides " + text_of(strides));
    return *this;
  }
  const Checked& unit() const {
    if (t_ && t_->dim() && t_->stride(-1) != 1 && t_->size(-1) > 1)
      refuse("a contiguous last axis", "strides " + text_of(t_->strides()));
    return *this;
  }

 private:
  template <class Sizes>
  static std::string text_of(const Sizes& sizes) {
    std::string text;
    for (const int64_t n : sizes) text += (text.empty() ? "" : ", ") + (n == kAny ? "any" : std::to_string(n));
    return "(" + text + ")";
  }
  static std::string name_of(ScalarType dtype) {
    switch (dtype) {
      case ScalarType::Float: return "float32";
      case ScalarType::BFloat16: return "bfloat16";
      case ScalarType::Half: return "float16";
      case ScalarType::Double: return "float64";
      case ScalarType::Long: return "int64";
      case ScalarType::Int: return "int32";
      case ScalarType::Char: return "int8";
      case ScalarType::Bool: return "bool";
      default: return "dtype " + std::to_string(int(dtype));
    }
  }
  [[noreturn]] void refuse(const std::string& wanted, const std::string& got) const {
    STD_TORCH_CHECK(false, "transformer_fast: ", name_, ": wanted ", wanted, ", got ", got);
  }

  const Tensor* t_;
  const char* name_;
};

// Makes a Checked of each tensor of a call, all on the device of the first.
class Check {
 public:
  explicit Check(const Tensor& like) : cpu_(like.is_cpu()), index_(cpu_ ? 0 : like.get_device_index()) {}

  Checked operator()(const Tensor& t, const char* name) const {
    STD_TORCH_CHECK(t.is_cpu() == cpu_ && (cpu_ || t.get_device_index() == index_), "transformer_fast: ", name,
                    ": wanted a tensor on the same device as the others");
    return Checked(&t, name);
  }
  Checked operator()(const OptionalTensor& t, const char* name) const {
    return t.has_value() ? (*this)(*t, name) : Checked(nullptr, name);
  }

 private:
  const bool cpu_;
  const int32_t index_;
};

// Raises an error unless all of the count values are in [0, end).
inline void check_values(const int64_t* values, int64_t count, int64_t end, const char* name) {
  for (int64_t i = 0; i < count; ++i)
    STD_TORCH_CHECK(0 <= values[i] && values[i] < end, "transformer_fast: ", name, ": wanted values in [0, ", end,
                    "), got ", values[i]);
}

// The panels of a weight (out, in): see linear.hpp.
inline void check_panels(const Checked& panels, int64_t out, int64_t in, Storage storage) {
  const int64_t scales = storage == Storage::i8 ? kScaleSlots / kPanel : 0;
  panels.shape({(out + kPanel - 1) / kPanel, in + scales, kPanel}).contiguous();
}

inline Activation activation_of(int64_t activation) {
  STD_TORCH_CHECK(0 <= activation && activation <= int64_t(Activation::silu),
                  "transformer_fast: activation: wanted 0 to ", int64_t(Activation::silu), ", got ", activation);
  return Activation(activation);
}
// Of a linear layer; -1: none.
template <class Call>
void take_activation(Call& a, int64_t activation) {
  a.has_activation = activation >= 0;
  if (a.has_activation) a.activation = activation_of(activation);
}

}  // namespace tf
