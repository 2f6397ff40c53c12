#include "cpu/recurrent_step.hpp"

#include "check.hpp"
#include "step_weight.hpp"

namespace tf {
namespace {

// A weight (out, in) with its bias, checked; adds its bytes to s.weight_bytes.
StepWeight checked(const char* name, const OptionalTensor& weight, const OptionalTensor& bias, int64_t out, int64_t in,
                   RecurrentStep& s) {
  STD_TORCH_CHECK(weight.has_value(), name, ": wanted a weight (", out, ", ", in, "), got none");
  StepWeight w = weight_of({weight, bias}, 0, out, in);
  STD_TORCH_CHECK(w.out == out && w.in == in, name, ": wanted a weight (", out, ", ", in, "), got (", w.out, ", ",
                  w.in, ")");
  if (weight->dim() == 3)
    check_panels(Checked(&*weight, name), out, in, w.storage);
  else if (w.storage == Storage::i8)
    Checked(&*weight, name).contiguous();
  if (bias.has_value()) Checked(&*bias, "biases").dtype(ScalarType::Float).numel(out).contiguous();
  s.weight_bytes += bytes_of(w);
  return w;
}

StepWeight gathered(const char* name, const OptionalTensor& weight, const OptionalTensor& bias, int64_t out, int64_t in,
                    RecurrentStep& s) {
  const StepWeight w = checked(name, weight, bias, out, in, s);
  if (split_floats(w) > s.split_floats) s.split_floats = split_floats(w);
  return w;
}

void fill_gates(StepWeight* gates, const OptionalTensors& weights, size_t at, const OptionalTensor& bias, int64_t in,
                RecurrentStep& s) {
  const int64_t count = gates_of(s.cell), width = s.width;
  if (bias.has_value()) Checked(&*bias, "biases").dtype(ScalarType::Float).numel(count * width).contiguous();
  for (int64_t g = 0; g < count; ++g) {
    gates[g] = checked("weights", weights[at + size_t(g)], OptionalTensor(), width, in, s);
    STD_TORCH_CHECK(gates[g].layout == WeightLayout::panels || gates[g].layout == WeightLayout::rows,
                    "weights: wanted the cells' weights in panels or with contiguous rows");
    if (bias.has_value()) gates[g].bias = read<float>(bias) + g * width;
  }
}

void recurrent_step(Tensor ids, Tensor token, Tensor hidden, OptionalTensor memory, OptionalTensor feed,
                    OptionalTensor keys, OptionalTensor values, OptionalTensor mask, OptionalTensor sources,
                    OptionalTensor score_weight, OptionalTensors weights, OptionalTensors biases, bool maxout,
                    int64_t readout_size, Tensor next_hidden, OptionalTensor next_memory, OptionalTensor next_feed,
                    OptionalTensor logits, OptionalTensor screen, OptionalTensor bounds, OptionalTensor barred,
                    OptionalTensor tokens, int64_t vocabulary) {
  const Check check(hidden);
  const ScalarType wide = ScalarType::Float;
  check(ids, "ids").dtype(ScalarType::Long).shape({kAny}).contiguous();
  check(token, "token").shape({kAny, kAny}).contiguous();
  const int64_t of_rows = ids.size(0);
  check(hidden, "hidden").dtype(wide).shape({kAny, of_rows, kAny}).contiguous();
  const int64_t state = hidden.size(2);
  check(memory, "memory").dtype(wide).shape_of(hidden).contiguous();
  check(feed, "feed").dtype(wide).shape({of_rows, readout_size}).contiguous();
  check(values, "values").dtype(wide).shape({kAny, kAny, state}).contiguous();
  STD_TORCH_CHECK(values.has_value() || !(feed.has_value() || keys.has_value() || mask.has_value()),
                  "transformer_fast: values: wanted with feed, keys or mask, got none");
  STD_TORCH_CHECK(!values.has_value() || keys.has_value() || values->size(1) > 0,
                  "transformer_fast: values: wanted at least one per source");
  if (values.has_value()) {
    check(keys, "keys").dtype(wide).shape({values->size(0), values->size(1), kAny}).contiguous();
    check(mask, "mask").dtype(ScalarType::Bool).shape({values->size(0), values->size(1)}).contiguous();
  }
  check(sources, "sources").dtype(ScalarType::Int).shape({of_rows}).contiguous();
  const int64_t scored = keys.has_value() ? keys->size(2) : state;
  check(score_weight, "score_weight").dtype(wide).shape({scored}).contiguous();
  check(next_hidden, "next_hidden").dtype(wide).shape_of(hidden).contiguous();
  check(next_memory, "next_memory").dtype(wide).shape_of(hidden).contiguous();
  check(next_feed, "next_feed").dtype(wide).shape({of_rows, readout_size}).contiguous();
  check(logits, "logits").dtype(wide).shape({of_rows, vocabulary}).contiguous();
  check(screen, "screen").dtype(ScalarType::Char).contiguous();
  check(bounds, "bounds").dtype(wide).contiguous();
  check(barred, "barred").dtype(ScalarType::Long).contiguous();
  check(tokens, "tokens").dtype(ScalarType::Long).contiguous();
  STD_TORCH_CHECK(hidden.size(0) > 0, "transformer_fast: hidden: wanted at least one layer, got none");
  STD_TORCH_CHECK(memory.has_value() == next_memory.has_value(),
                  "transformer_fast: next_memory: wanted one with memory, else none");
  RecurrentStep s{};
  s.cell = memory.has_value() ? Cell::lstm : Cell::gru;
  s.context = !values.has_value() ? Context::none
              : !keys.has_value() ? Context::given
              : score_weight.has_value() ? Context::additive : Context::dot;
  s.maxout = maxout;
  s.rows = ids.size(0);
  s.layers = hidden.size(0);
  s.width = hidden.size(2);
  s.embedding = token.size(1);
  s.ids = read<int64_t>(ids);
  s.token_dtype = dtype_of(token);
  s.token = read(token);
  s.hidden = read<float>(hidden);
  s.memory = read<float>(memory);
  s.feed = read<float>(feed);
  s.keys = read<float>(keys);
  s.values = read<float>(values);
  s.mask = read<bool>(mask);
  s.sources = read<int32_t>(sources);
  s.score_weight = read<float>(score_weight);
  s.length = values.has_value() ? values->size(1) : 0;
  s.score_width = keys.has_value() ? keys->size(2) : 0;
  s.int8 = &int8_kernels();
  const size_t layers = size_t(s.layers), gates = size_t(gates_of(s.cell)), cells = 2 * layers * gates;
  STD_TORCH_CHECK(weights.size() == cells + 3 && biases.size() == 2 * layers + 3, "weights: wanted ", cells + 3,
                  " and ", 2 * layers + 3, " biases, got ", weights.size(), " and ", biases.size());
  std::vector<RecurrentCell> of_layers(layers);
  const int64_t beside = maxout ? s.width : feed.has_value() ? readout_size : 0;
  for (size_t l = 0; l < layers; ++l) {
    const int64_t in = l ? s.width : s.embedding + beside;
    fill_gates(of_layers[l].input, weights, 2 * l * gates, biases[2 * l], in, s);
    fill_gates(of_layers[l].hidden, weights, (2 * l + 1) * gates, biases[2 * l + 1], s.width, s);
  }
  s.cells = of_layers.data();
  const OptionalTensor *w = &weights[cells], *b = &biases[2 * layers];
  STD_TORCH_CHECK(w[0].has_value() || !keys.has_value() || s.score_width == s.width, "keys: wanted width ", s.width,
                  " without a query weight, got ", s.score_width);
  STD_TORCH_CHECK(!keys.has_value() || score_weight.has_value() || s.score_width == s.width, "keys: wanted width ",
                  s.width, " without score_weight, got ", s.score_width);
  if (w[0].has_value()) s.query = gathered("query", w[0], b[0], s.score_width, s.width, s);
  const bool reads = maxout || s.context != Context::none;
  STD_TORCH_CHECK(!maxout || s.context != Context::none, "values: wanted with maxout, got none");
  if (reads)
    s.readout = gathered("readout", w[1], b[1], maxout ? 2 * readout_size : readout_size,
                         2 * s.width + (maxout ? s.embedding : 0), s);
  STD_TORCH_CHECK(logits.has_value() != tokens.has_value(), "logits, tokens: wanted one of them");
  s.head = gathered("head", w[2], b[2], vocabulary, reads ? readout_size : s.width, s);
  s.next_hidden = write<float>(next_hidden);
  s.next_memory = write<float>(next_memory);
  s.next_feed = write<float>(next_feed);
  s.logits = write<float>(logits);
  if (tokens.has_value()) s.choice = choice_of(s.head, s.rows, screen, bounds, barred, *tokens);
  const int64_t words = token.size(0), count = values.has_value() ? values->size(0) : s.rows;
  STD_TORCH_CHECK(s.sources || s.rows <= count, "sources: wanted one for each of ", s.rows, " rows, got none");
  for (int64_t r = 0; r < s.rows; ++r) {
    STD_TORCH_CHECK(s.ids[r] >= 0 && s.ids[r] < words, "ids: ", s.ids[r], " is not one of ", words, " tokens");
    if (s.sources)
      STD_TORCH_CHECK(s.sources[r] >= 0 && s.sources[r] < count, "sources: ", s.sources[r], " is not one of ", count);
  }
  kernels().recurrent_step(s);
}

}  // namespace
}  // namespace tf

STABLE_TORCH_LIBRARY_IMPL(transformer_fast, CPU, m) {
  m.impl("cpu_recurrent_step", TORCH_BOX(&tf::recurrent_step));
}
