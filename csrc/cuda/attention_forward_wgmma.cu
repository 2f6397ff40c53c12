// Describes the tensors of a forward call to TMA, chooses its tiles and launches it.
#include "attention_forward_wgmma.cuh"

#include <algorithm>
#include <cmath>

namespace tf::cuda {
namespace {

constexpr int64_t kL2Bytes = 32 << 20;  // keys and values that stay in the L2 cache while the blocks of a few heads run
constexpr int32_t kUnlimited = 1 << 30;  // of a window; positions stay below, so that their sums fit 32 bits

struct Extents {
  int64_t rows, heads, batch;
};

Extents query_extents(const AttentionForward& a) {
  return a.cu_q ? Extents{a.total_q, a.heads, 1} : Extents{a.queries, a.heads, a.batch};
}
Extents key_extents(const AttentionForward& a) {
  return a.cu_k ? Extents{a.total_k, a.key_heads, 1} : Extents{a.keys, a.key_heads, a.batch};
}

// 16 bytes are what TMA and a vector store are aligned to; an axis of one element is never stepped along.
bool is_aligned(const void* base, const Rows& rows, const Extents& extents) {
  const auto fits = [](int64_t stride, int64_t extent) {
    return extent == 1 || (stride > 0 && stride % 8 == 0 && stride < (int64_t(1) << 39));
  };
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && fits(rows.row, extents.rows) &&
         fits(rows.head, extents.heads) && fits(rows.batch, extents.batch);
}

TensorMap map_of(const AttentionForward& a, const void* base, const Rows& rows, const Extents& extents, int box_rows) {
  const auto bytes = [](int64_t stride, int64_t extent) { return uint64_t(extent == 1 ? 16 : 2 * stride); };
  const uint64_t sizes[4] = {uint64_t(a.dim), uint64_t(extents.rows), uint64_t(extents.heads),
                             uint64_t(extents.batch)};
  const uint64_t strides[3] = {bytes(rows.row, extents.rows), bytes(rows.head, extents.heads),
                               bytes(rows.batch, extents.batch)};
  const uint32_t box[4] = {64, uint32_t(box_rows), 1, 1};
  TensorMap map;
  const std::string error =
      make_tensor_map(&map, a.dtype, base, 4, sizes, strides, box, Swizzle::b128);
  if (!error.empty()) throw Refused("wgmma: " + error);
  return map;
}

template <class S>
void launch(const AttentionForward& a, Stream stream) {
  const int32_t blocks = (a.queries + S::BM - 1) / S::BM, groups = a.heads / a.key_heads;
  const int64_t key_bytes = std::max<int64_t>(1, int64_t(4) * a.keys * a.dim);
  ForwardWgmma p{};
  p.cu_q = a.cu_q;
  p.cu_k = a.cu_k;
  p.key_lengths = a.key_lengths;
  p.out = a.out;
  p.lse = a.lse;
  p.out_rows = a.out_rows;
  p.lse_batch = a.lse_batch;
  p.lse_head = a.lse_head;
  p.batch = a.batch;
  p.heads = a.heads;
  p.groups = groups;
  p.batch_heads = a.batch * a.heads;
  p.queries = a.queries;
  p.keys = a.keys;
  p.blocks = blocks;
  p.tiles = blocks * p.batch_heads;
  p.heads_together =
      int32_t(std::min<int64_t>(std::max<int64_t>(1, kL2Bytes / key_bytes) * groups, p.batch_heads));
  p.left = a.window_left < 0 ? kUnlimited : std::min(a.window_left, kUnlimited);
  p.right = a.window_right < 0 ? kUnlimited : std::min(a.window_right, kUnlimited);
  p.bottom_right = a.bottom_right;
  p.scale_log2 = a.scale * 1.44269504088896341f;
  const int32_t grid = std::min(p.tiles, multiprocessors());
  if (grid < p.tiles) p.counters = a.counters;
  TF_LAUNCH((attention_forward_wgmma_kernel<S>), dim3(unsigned(grid)), dim3(S::THREADS),
            forward_wgmma_shared_bytes<S>(), stream, map_of(a, a.q, a.q_rows, query_extents(a), S::BM),
            map_of(a, a.k, a.k_rows, key_extents(a), S::BN), map_of(a, a.v, a.v_rows, key_extents(a), S::BN), p);
}

template <class T>
void choose(const AttentionForward& a, Stream stream) {
  const bool windowed = a.window_left >= 0 || a.window_right >= 0;
  if (a.dim == 64) {
    if (windowed) return launch<ForwardWgmmaShape<T, 64, 192, 128, true>>(a, stream);
    return launch<ForwardWgmmaShape<T, 64, 192, 128, false>>(a, stream);
  }
  if (windowed) return launch<ForwardWgmmaShape<T, 128, 128, 128, true>>(a, stream);
  return launch<ForwardWgmmaShape<T, 128, 128, 176, false>>(a, stream);
}

}  // namespace

const char* attention_forward_wgmma_refuses(const AttentionForward& a) {
  if (compute_capability() != 90) return "wgmma: GPUs other than sm_90";
  if (a.dtype == DType::f32) return "wgmma: float32 data";
  if (a.dim != 64 && a.dim != 128) return "wgmma: head dims other than 64 and 128";
  if (a.bias_type != BiasType::none || a.relative) return "wgmma: a bias";
  if (a.mask) return "wgmma: a mask";
  if (a.softcap != 0.f) return "wgmma: a softcap";
  if (a.threshold != 0) return "wgmma: dropout";
  if (!(a.scale > 0.f) || std::isinf(a.scale)) return "wgmma: a scale that is not positive";  // it finds peaks unscaled
  if (a.queries <= 0 || a.keys <= 0 || a.batch <= 0) return "wgmma: no queries or no keys";
  if (!a.cu_q != !a.cu_k || (a.cu_q && (a.total_q <= 0 || a.total_k <= 0)))
    return "wgmma: packed tensors without rows";
  if (a.queries >= kUnlimited / 2 || a.keys >= kUnlimited / 2 || std::max(a.total_q, a.total_k) >= kUnlimited)
    return "wgmma: more than 2^29 queries or keys";
  if (int64_t(a.batch) * a.heads * ((int64_t(a.queries) + 127) / 128) > INT32_MAX / 2)
    return "wgmma: more than 2^30 tiles";
  if (!is_aligned(a.q, a.q_rows, query_extents(a)) || !is_aligned(a.k, a.k_rows, key_extents(a)) ||
      !is_aligned(a.v, a.v_rows, key_extents(a)) || !is_aligned(a.out, a.out_rows, query_extents(a)))
    return "wgmma: tensors or strides that are not multiples of 16 bytes";
  return nullptr;
}

bool attention_forward_wgmma_counts(const AttentionForward& a) {
  return a.window_left >= 0 || a.window_right >= 0 || a.cu_q || a.key_lengths;
}

void attention_forward_wgmma(const AttentionForward& a, Stream stream) {
  if (a.dtype == DType::bf16)
    choose<bf16_t>(a, stream);
  else
    choose<half_t>(a, stream);
}

}  // namespace tf::cuda
