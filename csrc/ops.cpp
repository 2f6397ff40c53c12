// The schemas of all native ops, and the functions of torch that the kernels use.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdlib>
#include <string>
#include <thread>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "bindings/attention.hpp"
#include "bindings/norm.hpp"
#include "cpu/parallel.hpp"

extern "C" void tf_parallel_for(int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  if (n <= 0) return;
  if (n <= grain) return body(0, n, context);
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}
#define TF_TEXT_OF(x) #x
#define TF_TEXT(x) TF_TEXT_OF(x)
// setup.py passes TF_SOURCE_HASH.
extern "C" __attribute__((visibility("default"))) const char* const tf_source_hash = TF_TEXT(TF_SOURCE_HASH);

extern "C" int tf_num_threads() { return int(torch::stable::get_num_threads()); }
extern "C" void tf_yield() { std::this_thread::yield(); }

namespace {
struct Buffer {
  void* data = nullptr;
  int64_t bytes = 0;
  ~Buffer() { std::free(data); }
};
}  // namespace
extern "C" void* tf_scratch(int slot, int64_t bytes) {
  thread_local Buffer buffers[8];
  Buffer& b = buffers[slot];
  if (b.bytes < bytes) {
    std::free(b.data);
    b.bytes = 0;
    int64_t rounded = (bytes + 4095) & ~int64_t(4095);
    b.data = std::aligned_alloc(64, size_t(rounded));
    STD_TORCH_CHECK(b.data != nullptr, "transformer_fast: no memory for ", rounded, " bytes of scratch");
    b.bytes = rounded;
  }
  return b.data;
}

namespace tf {

#define TF_FOR_EACH_ISA(X) TF_ISA_LIST(X)
#define TF_DECLARE(isa) extern const Kernels kernels_##isa;
TF_FOR_EACH_ISA(TF_DECLARE)

static const Kernels* active = &kernels_baseline;
const Kernels& kernels() { return *active; }

// Whether the processor multiplies tiles of bf16 and int8 (AMX) and the system lets this process: it has to be asked,
// as the tiles make what it saves of each thread larger by 8 KiB.
bool cpu_has_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  static const bool has = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned bf16 = 1u << 22, tile = 1u << 24, int8 = 1u << 25, all = bf16 | tile | int8;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & all) != all) return false;
    constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, Linux 5.16
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  }();
  return has;
#else
  return false;
#endif
}

// Whether this processor has the instruction set: see X86_ISAS in setup.py.
static bool has_isa(const std::string& name) {
#if defined(__x86_64__)
  if (name == "baseline") return true;
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return false;
  if (name == "avx2") return true;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512cd");
  if (!avx512 || name == "avx512") return avx512;
  return __builtin_cpu_supports("avx512bf16") && (name != "avx512_amx" || cpu_has_tiles());
#else
  return true;
#endif
}

// The instruction sets that were compiled and that the processor has, narrowest first: "baseline avx2 ...".
std::string cpu_isas() {
  std::string found;
#define TF_APPEND(isa) \
  if (has_isa(#isa)) found += (found.empty() ? "" : " ") + std::string(#isa);
  TF_FOR_EACH_ISA(TF_APPEND)
  return found;
}

// name: one of the compiled instruction sets.
void cpu_set_isa(std::string name) {
  STD_TORCH_CHECK(has_isa(name), "transformer_fast: this processor lacks instruction set ", name);
#define TF_SELECT(isa) \
  if (name == #isa) {  \
    active = &kernels_##isa; \
    return;            \
  }
  TF_FOR_EACH_ISA(TF_SELECT)
  STD_TORCH_CHECK(false, "transformer_fast: no CPU kernels were compiled for instruction set ", name);
}

// The architectures of this build's CUDA kernels: "80 90a ..."; "" when there are none.
std::string cuda_architectures() {
#ifdef TF_WITH_CUDA
  return TF_WITH_CUDA;
#else
  return "";
#endif
}

}  // namespace tf

STABLE_TORCH_LIBRARY_FRAGMENT(transformer_fast, m) {
  m.def("cpu_isas() -> str");
  m.def("cpu_set_isa(str name) -> ()");
  m.def("cuda_architectures() -> str");  // the schemas of the CUDA kernels' ops: csrc/bindings/cuda_*.cpp
  m.def("cpu_norm_forward" TF_NORM_FORWARD_SCHEMA);
  m.def("cpu_norm_backward" TF_NORM_BACKWARD_SCHEMA);
  // Data is as for the norms, bias a float32 vector.
  m.def("cpu_bias_activation_forward(Tensor x, Tensor? bias, Tensor? gate, int activation, Tensor(a!) y) -> ()");
  m.def(
      "cpu_bias_activation_backward(Tensor grad, Tensor x, Tensor? bias, Tensor? gate, int activation, "
      "Tensor(a!) grad_x, Tensor(b!)? grad_bias, Tensor(c!)? grad_gate) -> ()");
  // x, y: (batch, length, heads, width), last stride 1; cos, sin: float32 (positions, half); positions: int64.
  m.def(
      "cpu_rotary(Tensor x, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool inverse, Tensor(a!) y) "
      "-> ()");
  // query, y: as x; key, value: with key heads; caches: (batch, key heads, capacity, width); lengths: int32 or int64.
  m.def(
      "cpu_rotary_append(Tensor query, Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
      "Tensor lengths, Tensor cos, Tensor sin, Tensor? positions, Tensor? query_weight, Tensor? key_weight, float eps, "
      "bool interleaved, Tensor(c!) y) -> ()");
  m.def("cpu_dropout_forward(Tensor x, Tensor rng, float p, Tensor(a!) y) -> ()");
  // query, key, value, out and their gradients: (B, H, S, D) or, unpadded, (total, H, D); last stride 1. bias, mask:
  // 4-D. key_lengths, cu_seqlens: int32 or int64. relative_bias: reach covers every distance and 64 more. lse,
  // grad_lse: float32 (B, H, Sq) or (H, total_q). dbias: float32 zeros, shape of bias. drelative_bias: float32 zeros
  // (B, H, 2 * reach + 1).
  m.def("cpu_attention_forward(" TF_ATTENTION_SCHEMA "Tensor(a!) out, Tensor(b!)? lse) -> ()");
  m.def("cpu_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, " TF_ATTENTION_SCHEMA
        "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!)? dbias, Tensor(e!)? drelative_bias) -> ()");
  m.def("cpu_column_sum(Tensor x, Tensor(a!) out) -> ()");
  m.def("cpu_to_panels(Tensor weight, Tensor(a!) panels) -> ()");  // panels: see csrc/cpu/linear.hpp
  m.def("cpu_linear_panel(Tensor x, Tensor panels, Tensor? bias, int activation, Tensor(a!) y) -> ()");  // -1: none
  // float32: x (rows, in) with last stride 1, weights (out, in) with last stride 1, biases contiguous, y (rows, out).
  m.def("cpu_linear_rows(Tensor x, Tensor[] weights, Tensor?[] biases, int activation, Tensor[] y) -> ()");
  // float32: x (rows, in) with last stride 1, weight (out, in) with one stride 1, bias contiguous, y (rows, out).
  m.def("cpu_linear_long(Tensor x, Tensor weight, Tensor? bias, int activation, Tensor(a!) y) -> ()");
  // bfloat16: x (rows, in) and weight (out, in) with one stride 1 each, bias contiguous, y (rows, out). Fast with
  // avx512_amx.
  m.def("cpu_linear_bf16(Tensor x, Tensor weight, Tensor? bias, int activation, Tensor(a!) y) -> ()");
  // float32: g (rows, out) and x (rows, in) with last strides 1, y (out, in) and sums (out,) contiguous; rows > 0.
  m.def("cpu_weight_gradient(Tensor g, Tensor x, Tensor(a!) y, Tensor(b!)? sums) -> ()");
  // Hashes the memory of each tensor, in the order of addresses; the memory has no gaps. hashes: int64, one per tensor.
  m.def("cpu_content_hash(Tensor[] tensors, Tensor(a!) hashes) -> ()");
  // logits: (rows, classes), last stride 1; target: int64; all others float32.
  m.def(
      "cpu_cross_entropy_forward(Tensor logits, Tensor target, Tensor? weight, int ignore_index, "
      "float label_smoothing, float z_loss, Tensor(a!) losses, Tensor(b!) largest, Tensor(c!) total) -> ()");
  m.def(
      "cpu_cross_entropy_backward(Tensor grad_losses, Tensor logits, Tensor target, Tensor? weight, Tensor largest, "
      "Tensor total, int ignore_index, float label_smoothing, float z_loss, Tensor(a!) grad) -> ()");
  // ids: int64 (rows,), contiguous; tables: (entries, width), last stride 1; grad_v: float32 (rows, width).
  m.def(
      "cpu_embedding_layer_norm_forward(Tensor ids, Tensor word, Tensor? position_ids, Tensor? position, "
      "Tensor? type_ids, Tensor? token_type, Tensor? norm_weight, Tensor? norm_bias, Tensor? rng, float eps, "
      "float dropout_p, Tensor(a!) y, Tensor(b!) mean, Tensor(c!) rstd) -> ()");
  m.def(
      "cpu_embedding_layer_norm_backward(Tensor grad_y, Tensor ids, Tensor word, Tensor? position_ids, "
      "Tensor? position, Tensor? type_ids, Tensor? token_type, Tensor? norm_weight, Tensor mean, Tensor rstd, "
      "Tensor? rng, float dropout_p, Tensor(a!) grad_v, Tensor(b!)? grad_weight, Tensor(c!)? grad_bias) -> ()");
  m.def("cpu_embedding_gradient(Tensor grad_v, Tensor ids, int padding_idx, Tensor(a!) grad_table) -> ()");
  // A plan is plain memory that holds addresses: its owner must keep every tensor passed to it alive. norms and weights
  // hold pairs (weight, bias); a norm whose eps is negative is absent. bias, workspace, relative, logits: float32.
  m.def("cpu_decoder_plan_bytes(int layers) -> int");
  m.def("cpu_decoder_phase_bytes(int layers) -> int");
  m.def("cpu_decoder_split_floats(Tensor weight) -> int");  // of workspace, per row
  m.def(
      "cpu_decoder_plan_stack(Tensor(a!) plan, Tensor(b!) phases, Tensor(c!) workspace, Tensor token, "
      "Tensor? position, float embed_scale, Tensor?[] norms, float[] eps, bool rms, bool pre_norm, int activation, "
      "Tensor?[] head, float head_scale, int vocabulary, Tensor? cos, Tensor? sin, bool rotary_interleaved, "
      "bool parallel, bool qkv_by_head, float softcap, float logits_softcap, int layers, int heads, int key_heads, "
      "int head_dim, int feed_forward, int rows, int capacity, int cross_capacity, ScalarType cache_dtype) -> ()");
  m.def(
      "cpu_decoder_plan_layer(Tensor(a!) plan, int index, Tensor?[] norms, float[] eps, bool rms, Tensor?[] weights, "
      "Tensor?[] caches, Tensor? relative, float scale, float cross_scale, int window) -> ()");
  m.def(
      "cpu_decoder_step(Tensor(a!) plan, Tensor ids, Tensor? positions, Tensor(b!) table, Tensor? sources, "
      "Tensor? cross_lengths, int length, Tensor(c!) logits) -> ()");
  // As cpu_decoder_step, then the largest logit per row: tokens, int64 (rows, 1). barred: int64, tokens left out. With
  // values, tokens and values (rows, k) are the largest of log_softmax(logits); logits (rows, V) is scratch.
  m.def(
      "cpu_decoder_choose(Tensor(a!) plan, Tensor ids, Tensor? positions, Tensor(b!) table, Tensor? sources, "
      "Tensor? cross_lengths, int length, Tensor? barred, Tensor(c!) tokens, Tensor(d!)? values, "
      "Tensor(e!)? logits) -> ()");
  // query (B, Sq, D), key (B, Sk, D), value (B, Sk, Dv): last stride 1; score_weight, bias: float32 (D,). mask: bool
  // (B, Sq, Sk), any strides. weights, grad_query, grad_score_weight (B, D): float32. All results are contiguous.
#define TF_ADDITIVE \
  "Tensor query, Tensor key, Tensor value, Tensor score_weight, Tensor? bias, Tensor? mask, Tensor? key_lengths, "
  m.def("cpu_additive_attention_forward(" TF_ADDITIVE "Tensor(a!) out, Tensor(b!) weights) -> ()");
  m.def("cpu_additive_attention_backward(Tensor grad_out, Tensor? grad_weights, Tensor weights, " TF_ADDITIVE
        "Tensor(a!) grad_query, Tensor(b!) grad_key, Tensor(c!) grad_value, Tensor(d!) grad_score_weight) -> ()");
#undef TF_ADDITIVE
  // A GRU, or with memory an LSTM. gates: (positions, gates * width), last stride 1. panels: from cpu_to_panels; in the
  // forward pass of each gate's weight (width, width), in the backward pass of the transposed weight. hidden, memory:
  // (batch, width). sequences: int64 (3, batch): starts, lengths, and the order from longest to shortest. bias, saved
  // (positions, 4 * width), memories: float32. All but gates are contiguous.
  m.def(
      "cpu_recurrence_forward(Tensor gates, Tensor panels, Tensor? bias, Tensor hidden, Tensor? memory, "
      "Tensor sequences, int steps, bool reverse, Tensor(a!) out, Tensor(b!) last_hidden, Tensor(c!)? last_memory, "
      "Tensor(d!)? saved, Tensor(e!)? memories) -> ()");
  m.def(
      "cpu_recurrence_backward(Tensor? grad_out, Tensor? grad_last_hidden, Tensor? grad_last_memory, Tensor panels, "
      "Tensor hidden, Tensor? memory, Tensor sequences, int steps, bool reverse, Tensor out, Tensor saved, "
      "Tensor? memories, Tensor(a!) grad_gates, Tensor(b!)? grad_products, Tensor(c!) grad_hidden, "
      "Tensor(d!)? grad_memory) -> ()");
  // One token per row through a recurrent decoder; ids: int64 (rows,). weights: per layer the gates of the input, then
  // those of the hidden state, (width, in) with contiguous rows or in panels; then query, readout and head. biases: per
  // layer one for the input and one for the hidden state; then query, readout and head. sources: int32 (rows,). mask:
  // bool (sources, length). All others are contiguous float32: hidden, memory (layers, rows, width), feed (rows,
  // readout_size), keys and values (sources, length, ...), biases. Outputs overlap no input: logits; or with screen
  // (the head in int8 panels) and bounds of its error, int64 tokens (rows + 1,), the largest per row, none in barred.
  m.def(
      "cpu_recurrent_step(Tensor ids, Tensor token, Tensor hidden, Tensor? memory, Tensor? feed, Tensor? keys, "
      "Tensor? values, Tensor? mask, Tensor? sources, Tensor? score_weight, Tensor?[] weights, Tensor?[] biases, "
      "bool maxout, int readout_size, Tensor(a!) next_hidden, Tensor(b!)? next_memory, Tensor(c!)? next_feed, "
      "Tensor(d!)? logits, Tensor? screen, Tensor? bounds, Tensor? barred, Tensor(e!)? tokens, int vocabulary) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(transformer_fast, CompositeExplicitAutograd, m) {
  m.impl("cpu_isas", TORCH_BOX(&tf::cpu_isas));
  m.impl("cpu_set_isa", TORCH_BOX(&tf::cpu_set_isa));
  m.impl("cuda_architectures", TORCH_BOX(&tf::cuda_architectures));
}

extern "C" PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
