// The table of int8 kernels. They are compiled for more instruction sets than the others (those that multiply bytes),
// and chosen on their own.
#pragma once
#include "linear_int8.hpp"

namespace tf {

struct Int8Kernels {
  void (*quantize_weight)(const QuantizeWeight&);
  void (*pack)(const PackInt8&);
  void (*unpack)(const UnpackInt8&);
  void (*linear)(const Int8Linear&);
  void (*block)(const Int8Block&);
};

#ifdef TF_ISA
namespace TF_ISA {
void quantize_weight(const QuantizeWeight&);
void pack_int8(const PackInt8&);
void unpack_int8(const UnpackInt8&);
void int8_linear(const Int8Linear&);
void int8_block(const Int8Block&);
}  // namespace TF_ISA
#endif

}  // namespace tf
