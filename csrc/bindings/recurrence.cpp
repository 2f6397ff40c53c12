#include "tensors.hpp"

namespace tf {
namespace {

void fill(Recurrence& a, const Tensor& like, bool lstm, const Tensor& hidden, const OptionalTensor& memory,
          const Tensor& sequences, int64_t steps, bool reverse) {
  a.cell = lstm ? Cell::lstm : Cell::gru;
  a.dtype = dtype_of(like);
  a.batch = hidden.size(0);
  a.width = hidden.size(1);
  a.offsets = read<int64_t>(sequences);
  a.lengths = a.offsets + a.batch;
  a.order = a.lengths + a.batch;
  a.steps = steps;
  a.reverse = reverse;
  a.hidden = read(hidden);
  a.memory = read(memory);
}

void check_panels(const Tensor& panels, int64_t count, int64_t depth) {
  STD_TORCH_CHECK(panels.size(0) == count && panels.size(1) == depth && panels.size(2) == kPanel,
                  "panels: wanted shape (", count, ", ", depth, ", ", kPanel, ")");
}

void recurrence_forward(Tensor gates, Tensor panels, OptionalTensor bias, Tensor hidden, OptionalTensor memory,
                        Tensor sequences, int64_t steps, bool reverse, Tensor out, Tensor last_hidden,
                        OptionalTensor last_memory, OptionalTensor saved, OptionalTensor memories) {
  RecurrenceForward a{};
  fill(a, gates, memory.has_value(), hidden, memory, sequences, steps, reverse);
  STD_TORCH_CHECK(gates.stride(1) == 1, "transformer_fast: the last axis must be contiguous");
  check_panels(panels, gates_of(a.cell) * ((a.width + kPanel - 1) / kPanel), a.width);
  a.gates = read(gates);
  a.gates_stride = gates.stride(0);
  a.panels = read<float>(panels);
  a.bias = read<float>(bias);
  a.out = write(out);
  a.last_hidden = write(last_hidden);
  a.last_memory = write(last_memory);
  a.saved = write<float>(saved);
  a.memories = write<float>(memories);
  kernels().recurrence_forward(a);
}

void recurrence_backward(OptionalTensor grad_out, OptionalTensor grad_last_hidden, OptionalTensor grad_last_memory,
                         Tensor panels, Tensor hidden, OptionalTensor memory, Tensor sequences, int64_t steps,
                         bool reverse, Tensor out, Tensor saved, OptionalTensor memories, Tensor grad_gates,
                         OptionalTensor grad_products, Tensor grad_hidden, OptionalTensor grad_memory) {
  RecurrenceBackward a{};
  fill(a, out, memory.has_value(), hidden, memory, sequences, steps, reverse);
  check_panels(panels, (a.width + kPanel - 1) / kPanel, gates_of(a.cell) * a.width);
  a.grad_out = read(grad_out);
  a.grad_last_hidden = read(grad_last_hidden);
  a.grad_last_memory = read(grad_last_memory);
  a.panels = read<float>(panels);
  a.out = read(out);
  a.saved = read<float>(saved);
  a.memories = read<float>(memories);
  a.grad_gates = write(grad_gates);
  a.grad_products = write(grad_products);
  a.grad_hidden = write(grad_hidden);
  a.grad_memory = write(grad_memory);
  kernels().recurrence_backward(a);
}

}  // namespace
}  // namespace tf

STABLE_TORCH_LIBRARY_IMPL(transformer_fast, CPU, m) {
  m.impl("cpu_recurrence_forward", TORCH_BOX(&tf::recurrence_forward));
  m.impl("cpu_recurrence_backward", TORCH_BOX(&tf::recurrence_backward));
}
