#include <vector>

#include "check.hpp"
#include "cpu/kernels_int8.hpp"

namespace tf {
bool cpu_has_tiles();  // csrc/ops.cpp
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

bool has_int8_isa(const std::string& name) {
  if (name == "baseline") return true;
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return false;
  if (name == "avx2") return true;
#if __GNUC__ >= 11  // older compilers do not know the name
  if (name == "avx_vnni") return __builtin_cpu_supports("avxvnni");
#endif
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return false;
  return name == "avx512" || (__builtin_cpu_supports("avx512vnni") && (name == "avx512_vnni" || cpu_has_tiles()));
#else
  return false;
#endif
}

// The int8 instruction sets that were compiled and that the processor has, narrowest first: "baseline avx2 ...".
std::string cpu_int8_isas() {
  std::string found;
#define TF_APPEND_INT8(isa) \
  if (has_int8_isa(#isa)) found += (found.empty() ? "" : " ") + std::string(#isa);
  TF_INT8_ISA_LIST(TF_APPEND_INT8)
  return found;
}

// Groups and shapes of a weight (out, in) and what goes with it.
void check_group(int64_t in, int64_t group) {
  STD_TORCH_CHECK(in > 0, "transformer_fast: weight: wanted at least one input, got none");
  STD_TORCH_CHECK(group > 0 && group <= kInt8Group && group % 32 == 0 && kInt8Group % group == 0,
                  "transformer_fast: group: wanted 32, 64, 128 or 256, got ", group);
}
void check_parts(const Check& check, const Tensor& q, const Tensor& scale, int64_t group) {
  check(q, "q").dtype(ScalarType::Char).shape({kAny, kAny}).contiguous();
  check_group(q.size(1), group);
  check(scale, "scale").dtype(ScalarType::Float).shape({q.size(0), int8_groups(q.size(1), group)}).contiguous();
}
void check_panels(const Checked& panels, int64_t out, int64_t in, int64_t group) {
  check_group(in, group);
  panels.dtype(ScalarType::Char).shape({(out + kPanel - 1) / kPanel, int8_panel_bytes(in, group)}).contiguous();
}

void quantize_weight(Tensor weight, int64_t group, Tensor q, Tensor scale) {
  const Check check(weight);
  check_parts(check, q, scale, group);
  check(weight, "weight").shape_of(q);
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
  const Check check(weight);
  check_parts(check, weight, scale, group);
  check_panels(check(panels, "panels"), weight.size(0), weight.size(1), group);
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
  const Check check(panels);
  check_parts(check, weight, scale, group);
  check_panels(check(panels, "panels"), weight.size(0), weight.size(1), group);
  FromInt8Panels a{};
  a.panels = read<int8_t>(panels);
  a.weight = write<int8_t>(weight);
  a.scale = write<float>(scale);
  a.out = weight.size(0);
  a.in = weight.size(1);
  a.group = group;
  int8_kernels().from_panels(a);
}

Int8Weight weight_of(const Check& check, const OptionalTensor& panels, const OptionalTensor& bias, int64_t out,
                     int64_t in, int64_t group) {
  Int8Weight w{};
  if (!panels.has_value()) return w;
  check_panels(check(*panels, "panels"), out, in, group);
  check(bias, "biases").dtype(ScalarType::Float).shape({out}).contiguous();
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
  STD_TORCH_CHECK(!outs.empty() && outs.size() <= 3 && panels.size() == outs.size() && biases.size() == outs.size(),
                  "transformer_fast: panels, biases, outs: wanted one to three each, got ", panels.size(), ", ",
                  biases.size(), " and ", outs.size());
  int64_t columns = 0;
  for (const int64_t out : outs) {
    STD_TORCH_CHECK(out > 0, "transformer_fast: outs: wanted at least one output, got ", out);
    columns += out;
  }
  const Check check(x);
  check(x, "x").shape({kAny, kAny}).unit();
  check(y, "y").shape({x.size(0), columns}).unit().unshared();
  LinearInt8 a{};
  a.x_dtype = dtype_of(x);
  a.y_dtype = dtype_of(y);
  a.x = read(x);
  a.y = write(y);
  a.rows = x.size(0);
  a.x_stride = x.stride(0);
  a.y_stride = y.stride(0);
  for (size_t i = 0; i < outs.size(); ++i) {
    STD_TORCH_CHECK(panels[i].has_value(), "transformer_fast: panels: wanted a tensor for each weight, got none");
    weights[i] = weight_of(check, panels[i], biases[i], outs[i], x.size(1), group);
  }
  a.weights = weights;
  a.count = int64_t(outs.size());
  take_activation(a, activation);
  if (a.rows) int8_kernels().linear(a);
}

// groups: of output, of up and gate, of down.
void int8_block(Tensor context, Tensor residual, OptionalTensors panels, OptionalTensors biases, int64_t feed_forward,
                std::vector<int64_t> groups, OptionalTensors norms, std::vector<double> eps, bool rms,
                int64_t activation, Tensor y) {
  STD_TORCH_CHECK(panels.size() == 4 && biases.size() == 4 && norms.size() == 4 && groups.size() == 3 &&
                      eps.size() == 2,
                  "transformer_fast: wanted four panels, biases and norms, three groups and two eps");
  STD_TORCH_CHECK(panels[0].has_value() && panels[1].has_value() && panels[3].has_value(),
                  "transformer_fast: panels: wanted all but the gate's, which may be absent");
  STD_TORCH_CHECK(feed_forward > 0, "transformer_fast: feed_forward: wanted at least 1, got ", feed_forward);
  const Check check(residual);
  check(residual, "residual").shape({kAny, kAny}).unit();
  check(context, "context").shape({residual.size(0), kAny}).unit();
  check(y, "y").dtype(residual.scalar_type()).shape_of(residual).contiguous();
  for (const OptionalTensor& norm : norms)
    check(norm, "norms").dtype(ScalarType::Float).shape({residual.size(1)}).contiguous();
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
  a.output = weight_of(check, panels[0], biases[0], a.width, context.size(1), groups[0]);
  a.up = weight_of(check, panels[1], biases[1], feed_forward, a.width, groups[1]);
  a.gate = weight_of(check, panels[2], biases[2], feed_forward, a.width, groups[1]);
  a.down = weight_of(check, panels[3], biases[3], a.width, feed_forward, groups[2]);
  a.attention_norm = {read<float>(norms[0]), read<float>(norms[1]), float(eps[0]), rms};
  a.output_norm = {read<float>(norms[2]), read<float>(norms[3]), float(eps[1]), rms};
  a.activation = activation_of(activation);
  if (a.rows) int8_kernels().block(a);
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
