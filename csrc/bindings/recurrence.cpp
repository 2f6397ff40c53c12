#include <vector>

#include "check.hpp"
#include "cpu/parallel.hpp"

namespace tf {
namespace {

// like: (positions, ...), of the dtype of the states.
Check take(Recurrence& a, const Tensor& like, const Tensor& hidden, const OptionalTensor& memory,
           const Tensor& sequences, int64_t steps, bool reverse) {
  const Check check(like);
  const bool lstm = memory.has_value();
  check(hidden, "hidden").dtype(like.scalar_type()).shape({kAny, kAny}).contiguous();
  check(memory, "memory").dtype(like.scalar_type()).shape_of(hidden).contiguous();
  check(sequences, "sequences").dtype(ScalarType::Long).shape({3, hidden.size(0)}).contiguous();
  a.cell = lstm ? Cell::lstm : Cell::gru;
  a.dtype = dtype_of(like);
  a.batch = hidden.size(0);
  a.width = hidden.size(1);
  a.offsets = read<int64_t>(sequences);
  a.lengths = a.offsets + a.batch;
  a.order = a.lengths + a.batch;
  STD_TORCH_CHECK(steps >= 0, "transformer_fast: steps: wanted at least 0, got ", steps);
  a.steps = least(steps, like.size(0));
  a.reverse = reverse;
  a.hidden = read(hidden);
  a.memory = read(memory);
  const int64_t positions = like.size(0);
  std::vector<bool> seen(size_t(a.batch), false);
  for (int64_t i = 0; i < a.batch; ++i) {
    const int64_t from = a.offsets[i], length = a.lengths[i], at = a.order[i];
    STD_TORCH_CHECK(0 <= length && length <= steps && 0 <= from && from <= positions - length,
                    "transformer_fast: sequences: ", length, " positions from ", from, ", wanted at most ", steps,
                    " within ", positions);
    STD_TORCH_CHECK(0 <= at && at < a.batch && !seen[size_t(at)] &&
                        (!i || a.lengths[at] <= a.lengths[a.order[i - 1]]),
                    "transformer_fast: sequences: wanted their order from longest to shortest");
    seen[size_t(at)] = true;
  }
  return check;
}

int64_t panels_of(int64_t width) { return (width + kPanel - 1) / kPanel; }

void check_axes(const Tensor& t, const char* name) { Check{t}(t, name).shape({kAny, kAny}); }

void recurrence_forward(Tensor gates, Tensor panels, OptionalTensor bias, Tensor hidden, OptionalTensor memory,
                        Tensor sequences, int64_t steps, bool reverse, Tensor out, Tensor last_hidden,
                        OptionalTensor last_memory, OptionalTensor saved, OptionalTensor memories) {
  RecurrenceForward a{};
  check_axes(gates, "gates");
  const Check check = take(a, gates, hidden, memory, sequences, steps, reverse);
  const int64_t inner = gates_of(a.cell) * a.width, positions = gates.size(0);
  const ScalarType dtype = gates.scalar_type();
  check(gates, "gates").shape({positions, inner}).unit();
  check(panels, "panels").dtype(ScalarType::Float);
  check(panels, "panels").shape({gates_of(a.cell) * panels_of(a.width), a.width, kPanel}).contiguous();
  check(bias, "bias").dtype(ScalarType::Float).numel(inner).contiguous();
  check(out, "out").dtype(dtype).shape({positions, a.width}).contiguous();
  check(last_hidden, "last_hidden").dtype(dtype).shape_of(hidden).contiguous();
  check(last_memory, "last_memory").dtype(dtype).shape_of(hidden).contiguous();
  check(saved, "saved").dtype(ScalarType::Float).shape({positions, 4 * a.width}).contiguous();
  check(memories, "memories").dtype(ScalarType::Float).shape({positions, a.width}).contiguous();
  const bool lstm = a.cell == Cell::lstm;
  STD_TORCH_CHECK(lstm == last_memory.has_value(), "transformer_fast: last_memory: wanted one with memory, else none");
  STD_TORCH_CHECK(!lstm || saved.has_value() == memories.has_value(),
                  "transformer_fast: memories: wanted together with saved");
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
  check_axes(out, "out");
  const Check check = take(a, out, hidden, memory, sequences, steps, reverse);
  const int64_t inner = gates_of(a.cell) * a.width, positions = out.size(0);
  const ScalarType dtype = out.scalar_type();
  check(out, "out").shape({positions, a.width}).contiguous();
  check(grad_out, "grad_out").dtype(dtype).shape_of(out).contiguous();
  check(grad_last_hidden, "grad_last_hidden").dtype(dtype).shape_of(hidden).contiguous();
  check(grad_last_memory, "grad_last_memory").dtype(dtype).shape_of(hidden).contiguous();
  check(panels, "panels").dtype(ScalarType::Float).shape({panels_of(a.width), inner, kPanel}).contiguous();
  check(saved, "saved").dtype(ScalarType::Float).shape({positions, 4 * a.width}).contiguous();
  check(memories, "memories").dtype(ScalarType::Float).shape_of(out).contiguous();
  check(grad_gates, "grad_gates").dtype(dtype).shape({positions, inner}).contiguous();
  check(grad_products, "grad_products").dtype(dtype).shape({positions, inner}).contiguous();
  check(grad_hidden, "grad_hidden").dtype(dtype).shape_of(hidden).contiguous();
  check(grad_memory, "grad_memory").dtype(dtype).shape_of(hidden).contiguous();
  const bool lstm = a.cell == Cell::lstm;
  STD_TORCH_CHECK(lstm == memories.has_value() && lstm == grad_memory.has_value(),
                  "transformer_fast: memories, grad_memory: wanted both with memory, else none");
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
