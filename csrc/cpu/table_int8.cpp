// The table of int8 kernels of one instruction set; compiled once per int8 instruction set.
#include "kernels_int8.hpp"

#define TF_CONCAT_(a, b) a##b
#define TF_CONCAT(a, b) TF_CONCAT_(a, b)

namespace tf {
extern const Int8Kernels TF_CONCAT(int8_kernels_, TF_ISA);
const Int8Kernels TF_CONCAT(int8_kernels_, TF_ISA) = {
    TF_ISA::quantize_weight, TF_ISA::int8_to_panels,  TF_ISA::int8_from_panels,   TF_ISA::linear_int8,
    TF_ISA::int8_block,      TF_ISA::int8_quantize, TF_ISA::int8_product,
};
}  // namespace tf
