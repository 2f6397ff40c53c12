// The tensors of a call are the global memory of its kernels.
#include "tensors.hpp"

#include "machine.hpp"

namespace tf {

void name_tensor(const Tensor& t, const void* data, bool writable) {
  if (t.numel() == 0) return;
  int64_t last = 0;
  for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
  emulator::add_range(data, size_t(last + 1) * size_t(t.element_size()), writable);
}

void forget_tensors() { emulator::clear_ranges(); }

}  // namespace tf
