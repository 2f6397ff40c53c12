// The table of int8 kernels. They are compiled for more instruction sets than the others (also those that multiply
// bytes), and are selected independently.
#pragma once
#include "linear_int8.hpp"

namespace tf {

struct Int8Kernels {
  void (*quantize_weight)(const QuantizeWeight&);
  void (*to_panels)(const ToInt8Panels&);
  void (*from_panels)(const FromInt8Panels&);
  void (*linear)(const LinearInt8&);
  void (*block)(const Int8Block&);
  // Quantise a row x (n,); multiply rows by one panel of 32 columns, out (rows, 32).
  void (*quantize)(const float* x, int64_t n, int64_t group, const Int8Rows& to, int64_t row);
  void (*product)(const Int8Weight& w, const Int8Rows& x, int64_t row, int64_t rows, int64_t panel, float* out);
};

const Int8Kernels& int8_kernels();  // of the instruction set in use

#ifdef TF_ISA
namespace TF_ISA {
void quantize_weight(const QuantizeWeight&);
void int8_to_panels(const ToInt8Panels&);
void int8_from_panels(const FromInt8Panels&);
void linear_int8(const LinearInt8&);
void int8_block(const Int8Block&);
void int8_quantize(const float* x, int64_t n, int64_t group, const Int8Rows& to, int64_t row);
void int8_product(const Int8Weight& w, const Int8Rows& x, int64_t row, int64_t rows, int64_t panel, float* out);
}  // namespace TF_ISA
#endif

}  // namespace tf
