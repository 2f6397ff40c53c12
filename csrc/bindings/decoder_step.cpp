#include "cpu/decoder_step.hpp"
#include "cpu/parallel.hpp"

#include "step_weight.hpp"

namespace tf {
namespace {

DecoderPlan& plan_of(const Tensor& plan) { return *static_cast<DecoderPlan*>(plan.mutable_data_ptr()); }

int64_t decoder_plan_bytes(int64_t layers) {
  return int64_t(sizeof(DecoderPlan) + sizeof(DecoderLayer) * size_t(layers));
}
int64_t decoder_phase_bytes(int64_t layers) {
  return int64_t(sizeof(PhaseCounter)) * (kLayerPhases * layers + kStackPhases);
}

// tensors[at]: weight, tensors[at + 1]: bias
StepNorm norm_of(const OptionalTensors& tensors, size_t at, double eps, bool rms) {
  return {read<float>(tensors[at]), read<float>(tensors[at + 1]), float(eps), rms};
}

// Floats of workspace per row for the products with this weight.
int64_t decoder_split_floats(Tensor weight) {
  if (weight.dim() == 2 && weight.scalar_type() == ScalarType::Char)  // an upper bound: the group size is not known
    return 2 * (int8_row_floats(weight.size(1) / kPanel, 32) + 1);
  return split_floats(weight_of({weight, OptionalTensor()}, 0, 0, 0));
}

void decoder_plan_stack(Tensor plan, Tensor phases, Tensor workspace, Tensor token, OptionalTensor position,
                        double embed_scale, OptionalTensors norms, std::vector<double> eps, bool rms, bool pre_norm,
                        int64_t activation,
                        OptionalTensors head, double head_scale, int64_t vocabulary, OptionalTensor cos,
                        OptionalTensor sin, bool rotary_interleaved, bool parallel, bool qkv_by_head,
                        double softcap, double logits_softcap, int64_t layers, int64_t heads, int64_t key_heads,
                        int64_t head_dim, int64_t feed_forward, int64_t rows, int64_t capacity, int64_t cross_capacity,
                        ScalarType cache_dtype) {
  STD_TORCH_CHECK(head_dim <= 256, "head_dim: wanted at most 256, got ", head_dim);
  STD_TORCH_CHECK(!qkv_by_head || heads == key_heads, "key_heads: wanted ", heads, " with qkv_by_head, got ",
                  key_heads);
  DecoderPlan& p = plan_of(plan);
  p = DecoderPlan{};
  p.layers = layers;
  p.width = token.size(1);
  p.heads = heads;
  p.key_heads = key_heads;
  p.head_dim = head_dim;
  p.feed_forward = feed_forward;
  p.rows = rows;
  p.pre_norm = pre_norm;
  p.parallel = parallel;
  p.qkv_by_head = qkv_by_head;
  p.softcap = float(softcap);
  p.logits_softcap = float(logits_softcap);
  p.cos = read<float>(cos);
  p.sin = read<float>(sin);
  if (cos.has_value()) p.rotary_positions = cos->size(0), p.rotary_half = cos->size(1);
  p.rotary_interleaved = rotary_interleaved;
  p.activation = Activation(activation);
  p.embedding_dtype = dtype_of(token);
  p.cache_dtype = cache_dtype == ScalarType::Float ? DType::f32 : DType::bf16;
  p.token = read(token);
  p.tokens = token.size(0);
  p.position = read(position);
  p.positions = position.has_value() ? position->size(0) : 0;
  p.embed_scale = float(embed_scale);
  p.embedding_norm = norm_of(norms, 0, eps[0], rms);
  p.final_norm = norm_of(norms, 2, eps[1], rms);
  p.head = weight_of(head, 0, vocabulary, p.width);
  p.head_scale = float(head_scale);
  p.capacity = capacity;
  p.cross_capacity = cross_capacity;
  p.weight_bytes = bytes_of(p.head);
  const int64_t inner = (2 * heads + 2 * key_heads) * head_dim, floats = rows * (2 * p.width + inner + feed_forward);
  p.split_room = rows > 0 ? (int64_t(workspace.numel()) - floats) / rows : 0;
  STD_TORCH_CHECK(int64_t(workspace.numel()) >= floats && split_floats(p.head) <= p.split_room, "workspace: too small");
  p.workspace = write<float>(workspace);
  p.counters = static_cast<PhaseCounter*>(phases.mutable_data_ptr());
}

// norms: attention, cross, output, query, key, after attention, after output. caches: keys, values; the same of cross.
// weights: query, key, value (absent: in the one before), attention_output, cross_query, cross_output, up, gate, down.
void decoder_plan_layer(Tensor plan, int64_t index, OptionalTensors norms, std::vector<double> eps, bool rms,
                        OptionalTensors weights, OptionalTensors caches, OptionalTensor relative, double scale,
                        double cross_scale, int64_t window) {
  DecoderPlan& p = plan_of(plan);
  DecoderLayer& l = layers_of(&p)[index];
  const int64_t inner = p.heads * p.head_dim;
  l = DecoderLayer{};
  l.attention_norm = norm_of(norms, 0, eps[0], rms);
  l.cross_norm = norm_of(norms, 2, eps[1], rms);
  l.output_norm = norm_of(norms, 4, eps[2], rms);
  l.query_norm = norm_of(norms, 6, eps[3], rms);
  l.key_norm = norm_of(norms, 8, eps[4], rms);
  l.attention_after_norm = norm_of(norms, 10, eps[5], rms);
  l.output_after_norm = norm_of(norms, 12, eps[6], rms);
  const int64_t keys = p.key_heads * p.head_dim, all = inner + 2 * keys;
  int64_t outs = 0;
  for (size_t i = 0; i < 3; ++i) {
    l.qkv[i] = weight_of(weights, 2 * i, !weights[2].has_value() ? all : i ? keys : inner, p.width);
    outs += l.qkv[i].out;
  }
  STD_TORCH_CHECK(outs == all, "weights: wanted ", all, " columns of queries, keys and values, got ", outs);
  l.attention_output = weight_of(weights, 6, p.width, inner);
  l.cross_query = weight_of(weights, 8, inner, p.width);
  l.cross_output = weight_of(weights, 10, p.width, inner);
  l.up = weight_of(weights, 12, p.feed_forward, p.width);
  l.gate = weight_of(weights, 14, p.feed_forward, p.width);
  l.down = weight_of(weights, 16, p.width, p.feed_forward);
  for (const StepWeight* w : {&l.qkv[0], &l.qkv[1], &l.qkv[2], &l.attention_output, &l.cross_query, &l.cross_output,
                              &l.up, &l.gate, &l.down}) {
    p.weight_bytes += bytes_of(*w);
    STD_TORCH_CHECK(split_floats(*w) <= p.split_room, "workspace: too small");
  }
  STD_TORCH_CHECK(!l.gate.data || (l.gate.layout != WeightLayout::columns && l.up.layout != WeightLayout::columns),
                  "gate: wanted weights (out, in)");
  STD_TORCH_CHECK(!l.gate.data || ((l.gate.layout == WeightLayout::int8) == (l.up.layout == WeightLayout::int8) &&
                                   l.gate.group == l.up.group),
                  "gate: wanted the int8 layout of up, or no int8");
  l.relative = read<float>(relative);
  l.relative_count = relative.has_value() ? relative->size(1) : 0;
  l.scale = float(scale);
  l.cross_scale = float(cross_scale);
  l.window = window;
  l.keys = write(caches[0]);
  l.values = write(caches[1]);
  l.cross_keys = write(caches[2]);
  l.cross_values = write(caches[3]);
}

DecoderStep step_of(const Tensor& plan, const Tensor& ids, const OptionalTensor& positions, const Tensor& table,
                    const OptionalTensor& sources, const OptionalTensor& cross_lengths, int64_t length) {
  const DecoderPlan& p = plan_of(plan);
  DecoderStep s{};
  s.plan = &p;
  s.int8 = &int8_kernels();
  s.ids = read<int64_t>(ids);
  s.positions = read<int64_t>(positions);
  s.table = write<int32_t>(table);
  s.sources = read<int32_t>(sources);
  s.cross_lengths = read<int32_t>(cross_lengths);
  s.rows = ids.size(0);
  s.length = length;
  STD_TORCH_CHECK(s.rows <= p.rows, "ids: wanted at most ", p.rows, " rows, got ", s.rows);
  STD_TORCH_CHECK(length < p.capacity, "length: wanted less than ", p.capacity, ", got ", length);
  for (int64_t r = 0; r < s.rows; ++r) {
    STD_TORCH_CHECK(s.ids[r] >= 0 && s.ids[r] < p.tokens, "ids: ", s.ids[r], " is not one of ", p.tokens, " tokens");
    if (p.position)
      STD_TORCH_CHECK(s.positions[r] >= 0 && s.positions[r] < p.positions, "positions: ", s.positions[r],
                      " is not one of the model's ", p.positions);
    if (p.cos)
      STD_TORCH_CHECK(s.positions[r] >= 0 && s.positions[r] < p.rotary_positions, "positions: ", s.positions[r],
                      " is past the ", p.rotary_positions, " rows of cos and sin");
  }
  return s;
}

void decoder_step(Tensor plan, Tensor ids, OptionalTensor positions, Tensor table, OptionalTensor sources,
                  OptionalTensor cross_lengths, int64_t length, Tensor logits) {
  DecoderStep s = step_of(plan, ids, positions, table, sources, cross_lengths, length);
  s.logits = write<float>(logits);
  kernels().decoder_step(s);
}

void decoder_choose(Tensor plan, Tensor ids, OptionalTensor positions, Tensor table, OptionalTensor sources,
                    OptionalTensor cross_lengths, int64_t length, OptionalTensor barred, Tensor tokens,
                    OptionalTensor values, OptionalTensor logits) {
  DecoderStep s = step_of(plan, ids, positions, table, sources, cross_lengths, length);
  const int64_t count = tokens.size(1), vocabulary = s.plan->head.out;
  STD_TORCH_CHECK(tokens.size(0) == s.rows && count > 0 && count <= vocabulary, "tokens: wanted (", s.rows, ", 1 .. ",
                  vocabulary, "), got (", tokens.size(0), ", ", count, ")");
  if (values.has_value()) {
    STD_TORCH_CHECK(values->numel() == tokens.numel(), "values: wanted one per token");
    STD_TORCH_CHECK(logits.has_value() && logits->numel() == s.rows * vocabulary, "logits: wanted (", s.rows, ", ",
                    vocabulary, ") with values");
    s.logits = write<float>(logits);
  } else {
    STD_TORCH_CHECK(count == 1, "tokens: wanted one per row without values, got ", count);
    STD_TORCH_CHECK(s.plan->head.layout != WeightLayout::columns, "weights: wanted those of the head (out, in)");
  }
  std::vector<RowBest> best(size_t(tf_num_threads() * best_stride(s.rows)));
  s.choice = {read<int64_t>(barred), barred.has_value() ? barred->numel() : 0, count, best.data(),
              write<int64_t>(tokens), write<float>(values)};
  kernels().decoder_step(s);
}

}  // namespace
}  // namespace tf

STABLE_TORCH_LIBRARY_IMPL(transformer_fast, CPU, m) {
  m.impl("cpu_decoder_split_floats", TORCH_BOX(&tf::decoder_split_floats));
  m.impl("cpu_decoder_plan_stack", TORCH_BOX(&tf::decoder_plan_stack));
  m.impl("cpu_decoder_plan_layer", TORCH_BOX(&tf::decoder_plan_layer));
  m.impl("cpu_decoder_step", TORCH_BOX(&tf::decoder_step));
  m.impl("cpu_decoder_choose", TORCH_BOX(&tf::decoder_choose));
}
STABLE_TORCH_LIBRARY_IMPL(transformer_fast, CompositeExplicitAutograd, m) {
  m.impl("cpu_decoder_plan_bytes", TORCH_BOX(&tf::decoder_plan_bytes));
  m.impl("cpu_decoder_phase_bytes", TORCH_BOX(&tf::decoder_phase_bytes));
}
