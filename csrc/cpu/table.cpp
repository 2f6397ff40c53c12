// The table of kernels of one instruction set; compiled once per instruction set.
#include "kernels.hpp"

#define TF_CONCAT_(a, b) a##b
#define TF_CONCAT(a, b) TF_CONCAT_(a, b)
#define TF_ENTRY(name, Arguments) TF_ISA::name,

namespace tf {
extern const Kernels TF_CONCAT(kernels_, TF_ISA);
const Kernels TF_CONCAT(kernels_, TF_ISA) = {TF_KERNELS(TF_ENTRY)};
}  // namespace tf
