// Describes the tensors of a forward call to TMA, chooses its tiles and launches it.
#include "attention_forward_wgmma.cuh"

#include <algorithm>
#include <cmath>

#include "attention_tensor_map.cuh"

namespace tf::cuda {
namespace {

constexpr int64_t kL2Bytes = 32 << 20;  // budget for the keys and values of the heads that run together
constexpr int32_t kUnlimited = 1 << 30;  // an unlimited window: above all positions, and sums with them fit 32 bits

template <class S>
void launch(const AttentionForward& a, Stream stream) {
  const int32_t blocks = (a.max_seqlen_q + S::BM - 1) / S::BM, groups = a.heads / a.key_heads;
  const int64_t key_bytes = std::max<int64_t>(1, int64_t(4) * a.max_seqlen_k * a.dim);
  ForwardWgmma p{};
  p.cu_seqlens_q = a.cu_seqlens_q;
  p.cu_seqlens_k = a.cu_seqlens_k;
  p.key_lengths = a.key_lengths;
  p.out = a.out;
  p.lse = a.lse;
  p.out_strides = a.out_strides;
  p.lse_batch = a.lse_batch;
  p.lse_head = a.lse_head;
  p.batch = a.batch;
  p.heads = a.heads;
  p.groups = groups;
  p.batch_heads = a.batch * a.heads;
  p.max_seqlen_q = a.max_seqlen_q;
  p.max_seqlen_k = a.max_seqlen_k;
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
            forward_wgmma_shared_bytes<S>(), stream, map_of(a, a.query, a.query_strides, query_extents(a), S::BM),
            map_of(a, a.key, a.key_strides, key_extents(a), S::BN),
            map_of(a, a.value, a.value_strides, key_extents(a), S::BN), p);
}

// The fastest of those measured on an H200, at lengths from 1024 to 16384.
template <class T>
void choose(const AttentionForward& a, Stream stream) {
  const bool windowed = a.window_left >= 0 || a.window_right >= 0;
  if (a.dim == 64) {
    if (windowed) return launch<ForwardWgmmaShape<T, 64, 192, 128, true, false, false>>(a, stream);
    return launch<ForwardWgmmaShape<T, 64, 192, 128, false, true, true>>(a, stream);
  }
  if (windowed) return launch<ForwardWgmmaShape<T, 128, 128, 128, true, true, true>>(a, stream);
  return launch<ForwardWgmmaShape<T, 128, 128, 128, false, false, false>>(a, stream);
}

}  // namespace

const char* attention_forward_wgmma_refuses(const AttentionForward& a) {
  if (compute_capability() != 90) return "wgmma: GPUs other than sm_90";
  if (a.dtype == DType::f32) return "wgmma: float32 data";
  if (a.dim != 64 && a.dim != 128) return "wgmma: head dims other than 64 and 128";
  if (a.bias_type != BiasType::none || a.relative_bias) return "wgmma: a bias";
  if (a.mask) return "wgmma: a mask";
  if (a.softcap != 0.f) return "wgmma: a softcap";
  if (a.threshold != 0) return "wgmma: dropout";
  if (!(a.scale > 0.f) || std::isinf(a.scale)) return "wgmma: a scale that is not positive";  // peaks are unscaled
  if (a.max_seqlen_q <= 0 || a.max_seqlen_k <= 0 || a.batch <= 0) return "wgmma: no queries or no keys";
  if (!a.cu_seqlens_q != !a.cu_seqlens_k || (a.cu_seqlens_q && (a.total_q <= 0 || a.total_k <= 0)))
    return "wgmma: unpadded tensors without rows";
  if (std::max(a.max_seqlen_q, a.max_seqlen_k) >= kUnlimited / 2 || std::max(a.total_q, a.total_k) >= kUnlimited)
    return "wgmma: more than 2^29 queries or keys";
  if (int64_t(a.batch) * a.heads * ((int64_t(a.max_seqlen_q) + 127) / 128) > INT32_MAX / 2)
    return "wgmma: more than 2^30 tiles";
  if (!is_aligned(a.query, a.query_strides, query_extents(a)) || !is_aligned(a.key, a.key_strides, key_extents(a)) ||
      !is_aligned(a.value, a.value_strides, key_extents(a)) || !is_aligned(a.out, a.out_strides, query_extents(a)))
    return "wgmma: tensors or strides that are not multiples of 16 bytes";
  return nullptr;
}

bool attention_forward_wgmma_counts(const AttentionForward& a) {
  return a.window_left >= 0 || a.window_right >= 0 || a.cu_seqlens_q || a.key_lengths;
}

void attention_forward_wgmma(const AttentionForward& a, Stream stream) {
  if (a.dtype == DType::bf16)
    choose<bf16_t>(a, stream);
  else
    choose<half_t>(a, stream);
}

}  // namespace tf::cuda
