// Lays out the scratch memory of a backward call on wgmma and launches its kernels.
#include "attention_backward_wgmma.cuh"

#include <algorithm>

#include "attention_tensor_map.cuh"

namespace tf::cuda {
namespace {

constexpr int64_t kL2Bytes = 32 << 20;  // budget for the queries and gradients of the heads that run together
constexpr int kSharedLimit = 227 << 10;
static_assert(BackwardWgmmaTile<64, 128>::kBytes <= kSharedLimit &&
              BackwardWgmmaTile<128, 64>::kBytes <= kSharedLimit &&
              BackwardWgmmaTile<128, 80>::kBytes <= kSharedLimit);

// Queries per tile: as many as the registers hold. 80 does not divide into 128 keys, so that diagonals would need more
// masks, for which 80 leaves no registers.
int32_t tile_of(const AttentionBackward& a) {
  if (a.dim == 64) return 128;
  return a.window_left < 0 && a.window_right < 0 ? 80 : 64;
}

int64_t head_tiles(const AttentionBackward& a) {  // see first_tile
  const int64_t tile = tile_of(a);
  return a.cu_seqlens_q ? a.total_q / tile + a.batch : a.batch * ((a.max_seqlen_q + tile - 1) / tile);
}

template <class T, int D, int M>
void launch(const AttentionBackward& arguments, Stream stream) {
  using Tile = BackwardWgmmaTile<D, M>;
  BackwardWgmma a{arguments};
  a.head_tiles = head_tiles(a);
  const int64_t tiles = a.heads * a.head_tiles;
  a.sums = a.scratch;
  a.statistics = a.sums + tiles * M * D;
  a.center = a.statistics + tiles * M * 2;
  a.ticket = reinterpret_cast<int32_t*>(a.center + center_floats(a));
  a.turns = a.ticket + 4;
  a.query_blocks = (a.max_seqlen_q + M - 1) / M;
  a.key_blocks = (a.max_seqlen_k + Tile::kKeys - 1) / Tile::kKeys;
  a.exponent_scale = a.scale * kLog2e;
  // Causal: the blocks of a head differ in length. Deterministic: they wait for each other. Other heads fill the gaps.
  const int64_t head_bytes = int64_t(a.heads / a.key_heads) * a.max_seqlen_q * D * 8;
  const int64_t together = a.window_right >= 0 || a.deterministic ? kL2Bytes / head_bytes : 1;
  a.heads_together = int32_t(std::clamp<int64_t>(together, 1, int64_t(a.batch) * a.key_heads));

  const TensorMap q = map_of(a, a.query, a.query_strides, query_extents(a), M);
  const TensorMap k = map_of(a, a.key, a.key_strides, key_extents(a), Tile::kKeys);
  const TensorMap v = map_of(a, a.value, a.value_strides, key_extents(a), Tile::kKeys);
  const TensorMap grad = map_of(a, a.grad_out, a.grad_out_strides, query_extents(a), M);

  const dim3 by_queries(unsigned(a.query_blocks) * unsigned(a.batch * a.heads));
  const dim3 by_keys(unsigned(a.key_blocks) * unsigned(a.batch * a.key_heads));
  launch_center<T, D>(a, a.center, stream);
  TF_LAUNCH((attention_backward_prepare_kernel<T, D, M>), by_queries, dim3(256), 0, stream, a);
  TF_LAUNCH((attention_backward_wgmma_kernel<T, D, M>), by_keys, dim3(Tile::kThreads), Tile::kBytes, stream, a, q, k, v,
            grad);
  TF_LAUNCH((attention_backward_finish_kernel<T, D, M>), by_queries, dim3(256), 0, stream, a);
}

template <class T>
void choose(const AttentionBackward& a, Stream stream) {
  if (a.dim == 64) return launch<T, 64, 128>(a, stream);
  return tile_of(a) == 80 ? launch<T, 128, 80>(a, stream) : launch<T, 128, 64>(a, stream);
}

}  // namespace

const char* attention_backward_wgmma_refuses(const AttentionBackward& a) {
  if (compute_capability() != 90) return "wgmma: GPUs other than sm_90";
  if (a.dtype == DType::f32) return "wgmma: float32 data, where tensor cores would round to TF32";
  if (a.dim != 64 && a.dim != 128) return "wgmma: head dims other than 64 and 128";
  if (!is_plain(a)) return "wgmma: biases, masks, soft cap, dropout and scales that are not positive";
  if (a.dbias || a.drelative_bias) return "wgmma: gradients of biases";
  if (a.batch == 0 || a.max_seqlen_q == 0 || a.max_seqlen_k == 0 ||
      (a.cu_seqlens_q && (a.total_q == 0 || a.total_k == 0))) {
    return "wgmma: empty tensors";
  }
  if (a.max_seqlen_k < 32) return "wgmma: fewer than 32 keys, which leave the rounding of the output in the gradients";
  const Extents queries = query_extents(a), keys = key_extents(a);
  if (!is_aligned(a.query, a.query_strides, queries) || !is_aligned(a.out, a.out_strides, queries) ||
      !is_aligned(a.grad_out, a.grad_out_strides, queries) || !is_aligned(a.dq, a.dq_strides, queries) ||
      !is_aligned(a.key, a.key_strides, keys) || !is_aligned(a.value, a.value_strides, keys) ||
      !is_aligned(a.dk, a.dk_strides, keys) || !is_aligned(a.dv, a.dv_strides, keys)) {
    return "wgmma: addresses or strides that are not positive multiples of 16 bytes";
  }
  const int64_t blocks = int64_t(a.batch) * a.heads * (std::max(a.max_seqlen_q, a.max_seqlen_k) / 64 + 1);
  if (blocks > INT32_MAX / 8) return "wgmma: more blocks than a grid has";  // each has eight parts of dQ
  return nullptr;
}

int64_t attention_backward_wgmma_scratch(const AttentionBackward& a) {
  return a.heads * head_tiles(a) * (tile_of(a) * (a.dim + 2) + BackwardWgmmaTile<64, 128>::kParts) +
         center_floats(a) + 4;
}

void attention_backward_wgmma(const AttentionBackward& a, Stream stream) {
  a.dtype == DType::bf16 ? choose<bf16_t>(a, stream) : choose<half_t>(a, stream);
}

}  // namespace tf::cuda
