#include <string>
#include <vector>

#include "cpu/kernels_int8.hpp"
#include "tensors.hpp"

namespace tf {
namespace {

using OptionalTensors = std::vector<OptionalTensor>;

#define TF_DECLARE_INT8(isa) extern const Int8Kernels int8_kernels_##isa;
}  // namespace
TF_INT8_ISA_LIST(TF_DECLARE_INT8)
static const Int8Kernels* active_int8 = &int8_kernels_baseline;
const Int8Kernels& int8_kernels() { return *active_int8; }
namespace {

void cpu_set_int8_isa(std::string name) {
#define TF_SELECT_INT8(isa)              \
  if (name == #isa) {                    \
    active_int8 = &int8_kernels_##isa;   \
    return;                              \
  }
  TF_INT8_ISA_LIST(TF_SELECT_INT8)
  STD_TORCH_CHECK(false, "transformer_fast: no int8 kernels were compiled for instruction set ", name);
}

// The int8 instruction sets that were compiled and that the processor supports, narrowest first: "baseline avx2 ...".
std::string cpu_int8_isas() {
  std::string found = "baseline";
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx2) found += " avx2";
  if (avx2 && __builtin_cpu_supports("avxvnni")) found += " avx_vnni";
  if (avx512) found += " avx512";
  if (avx512 && __builtin_cpu_supports("avx512vnni")) found += " avx512_vnni";
#endif
  return found;
}

void quantize_weight(Tensor weight, int64_t group, Tensor q, Tensor scale) {
  QuantizeWeight a{};
  a.dtype = dtype_of(weight);
  a.weight = read(weight);
  a.q = write<int8_t>(q);
  a.scale = write<float>(scale);
  a.out = weight.size(0);
  a.in = weight.size(1);
  a.group = group;
  a.out_stride = weight.stride(0);
  a.in_stride = weight.stride(1);
  int8_kernels().quantize_weight(a);
}

void int8_to_panels(Tensor weight, Tensor scale, int64_t group, Tensor panels) {
  ToInt8Panels a{};
  a.weight = read<int8_t>(weight);
  a.scale = read<float>(scale);
  a.panels = write<int8_t>(panels);
  a.out = weight.size(0);
  a.in = weight.size(1);
  a.group = group;
  int8_kernels().to_panels(a);
}

void int8_from_panels(Tensor panels, int64_t group, Tensor weight, Tensor scale) {
  FromInt8Panels a{};
  a.panels = read<int8_t>(panels);
  a.weight = write<int8_t>(weight);
  a.scale = write<float>(scale);
  a.out = weight.size(0);
  a.in = weight.size(1);
  a.group = group;
  int8_kernels().from_panels(a);
}

Int8Weight weight_of(const OptionalTensor& panels, const OptionalTensor& bias, int64_t out, int64_t in, int64_t group) {
  Int8Weight w{};
  if (!panels.has_value()) return w;
  STD_TORCH_CHECK(panels->scalar_type() == ScalarType::Char && panels->size(0) == (out + kPanel - 1) / kPanel &&
                      panels->size(1) == int8_panel_bytes(in, group),
                  "panels: wanted int8 panels of a weight (", out, ", ", in, ") in groups of ", group);
  w.panels = read<int8_t>(*panels);
  w.bias = read<float>(bias);
  w.out = out;
  w.in = in;
  w.group = group;
  return w;
}

void linear_int8(Tensor x, OptionalTensors panels, OptionalTensors biases, std::vector<int64_t> outs, int64_t group,
                 int64_t activation, Tensor y) {
  Int8Weight weights[3];
  STD_TORCH_CHECK(!outs.empty() && outs.size() <= 3, "panels: wanted one to three weights, got ", outs.size());
  LinearInt8 a{};
  a.x_dtype = dtype_of(x);
  a.y_dtype = dtype_of(y);
  a.x = read(x);
  a.y = write(y);
  a.rows = x.size(0);
  a.x_stride = x.stride(0);
  a.y_stride = y.stride(0);
  for (size_t i = 0; i < outs.size(); ++i) weights[i] = weight_of(panels[i], biases[i], outs[i], x.size(1), group);
  a.weights = weights;
  a.count = int64_t(outs.size());
  a.has_activation = activation >= 0;
  a.activation = Activation(activation >= 0 ? activation : 0);
  int8_kernels().linear(a);
}

// groups: of output, of up and gate, of down.
void int8_block(Tensor context, Tensor residual, OptionalTensors panels, OptionalTensors biases, int64_t feed_forward,
                std::vector<int64_t> groups, OptionalTensors norms, std::vector<double> eps, bool rms, int64_t activation,
                Tensor y) {
  Int8Block a{};
  a.dtype = dtype_of(residual);
  a.context_dtype = dtype_of(context);
  a.context = read(context);
  a.residual = read(residual);
  a.y = write(y);
  a.rows = residual.size(0);
  a.width = residual.size(1);
  a.context_stride = context.stride(0);
  a.residual_stride = residual.stride(0);
  a.output = weight_of(panels[0], biases[0], a.width, context.size(1), groups[0]);
  a.up = weight_of(panels[1], biases[1], feed_forward, a.width, groups[1]);
  a.gate = weight_of(panels[2], biases[2], feed_forward, a.width, groups[1]);
  a.down = weight_of(panels[3], biases[3], a.width, feed_forward, groups[2]);
  a.attention_norm = {read<float>(norms[0]), read<float>(norms[1]), float(eps[0]), rms};
  a.output_norm = {read<float>(norms[2]), read<float>(norms[3]), float(eps[1]), rms};
  a.activation = Activation(activation);
  int8_kernels().block(a);
}

}  // namespace
}  // namespace tf

STABLE_TORCH_LIBRARY_FRAGMENT(transformer_fast, m) {
  m.def("cpu_set_int8_isa(str name) -> ()");
  m.def("cpu_int8_isas() -> str");
  // weight: (out, in), any strides; q: int8 (out, in); scale: float32 (out, groups); all contiguous.
  m.def("cpu_quantize_weight(Tensor weight, int group, Tensor(a!) q, Tensor(b!) scale) -> ()");
  m.def("cpu_int8_to_panels(Tensor weight, Tensor scale, int group, Tensor(a!) panels) -> ()");
  m.def("cpu_int8_from_panels(Tensor panels, int group, Tensor(a!) weight, Tensor(b!) scale) -> ()");
  // x, y, context, residual: (rows, ...), last stride 1; biases and norms float32. activation -1: none.
  m.def(
      "cpu_linear_int8(Tensor x, Tensor?[] panels, Tensor?[] biases, int[] outs, int group, int activation, "
      "Tensor(a!) y) -> ()");
  m.def(
      "cpu_int8_block(Tensor context, Tensor residual, Tensor?[] panels, Tensor?[] biases, int feed_forward, "
      "int[] groups, Tensor?[] norms, float[] eps, bool rms, int activation, Tensor(a!) y) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(transformer_fast, CompositeExplicitAutograd, m) {
  m.impl("cpu_set_int8_isa", TORCH_BOX(&tf::cpu_set_int8_isa));
  m.impl("cpu_int8_isas", TORCH_BOX(&tf::cpu_int8_isas));
}

STABLE_TORCH_LIBRARY_IMPL(transformer_fast, CPU, m) {
  m.impl("cpu_quantize_weight", TORCH_BOX(&tf::quantize_weight));
  m.impl("cpu_int8_to_panels", TORCH_BOX(&tf::int8_to_panels));
  m.impl("cpu_int8_from_panels", TORCH_BOX(&tf::int8_from_panels));
  m.impl("cpu_linear_int8", TORCH_BOX(&tf::linear_int8));
  m.impl("cpu_int8_block", TORCH_BOX(&tf::int8_block));
}
