// Lays out the scratch memory of a backward call on wgmma and launches its three kernels.
#include "attention_backward_wgmma.cuh"

#include <algorithm>

namespace tf::cuda {
namespace {

constexpr int64_t kL2Bytes = 32 << 20;  // queries and gradients that stay in the L2 cache while a few heads run
constexpr int kSharedLimit = 227 << 10;
static_assert(BackwardTile<64, 128>::kBytes <= kSharedLimit && BackwardTile<128, 80>::kBytes <= kSharedLimit);

// Queries of a tile. The most that registers hold; 80 do not divide 128 keys, which costs masks along a diagonal.
int32_t tile_of(const AttentionBackward& a) {
  if (a.dim == 64) return 128;
  return a.window_left < 0 && a.window_right < 0 ? 80 : 64;
}

// Every sequence starts at a multiple of a tile: see first_tile.
int64_t padded_rows(const AttentionBackward& a) {
  const int64_t tile = tile_of(a);
  return a.cu_q ? (a.total_queries / tile + a.batch) * tile : a.batch * ((a.queries + tile - 1) / tile * tile);
}

int64_t tiles_of(const AttentionBackward& a) { return a.heads * (padded_rows(a) / tile_of(a)); }

TensorMap map_of(const AttentionBackward& a, const void* base, const Rows& rows, int64_t count, int64_t heads,
                 int32_t box_rows) {
  const int64_t batch = a.cu_q ? 1 : a.batch;
  const int64_t sizes[] = {a.dim, count, heads, batch};
  const int64_t strides[] = {rows.row * 2, rows.head * 2, a.cu_q ? rows.row * 2 * count : rows.batch * 2};
  const int32_t box[] = {64, box_rows, 1, 1};
  TensorMap map;
  if (const char* error = make_tensor_map(&map, a.dtype, const_cast<void*>(base), 4, sizes, strides, box,
                                          Swizzle::bytes128)) {
    throw std::runtime_error(std::string("attention_backward_wgmma: ") + error);
  }
  return map;
}

template <class T, int D, int M>
void launch(const AttentionBackward& arguments, Stream stream) {
  using Tile = BackwardTile<D, M>;
  BackwardWgmma a{arguments};
  const int64_t tiles = tiles_of(a);
  a.padded_rows = padded_rows(a);
  a.sums = a.dq_accumulator;
  a.statistics = a.sums + tiles * M * D;
  a.ticket = reinterpret_cast<int32_t*>(a.statistics + tiles * M * 2);
  a.turns = a.ticket + 4;
  a.query_blocks = (a.queries + M - 1) / M;
  a.key_blocks = (a.keys + Tile::kKeys - 1) / Tile::kKeys;
  a.exponent_scale = a.scale * kLog2e;
  // Causal: a head's blocks differ in length. Deterministic: they wait for each other. Then other heads fill the gaps.
  const int64_t head_bytes = int64_t(a.heads / a.key_heads) * a.queries * D * 8;
  const int64_t together = a.window_right >= 0 || a.deterministic ? kL2Bytes / head_bytes : 1;
  a.heads_together = int32_t(std::clamp<int64_t>(together, 1, int64_t(a.batch) * a.key_heads));

  const bool packed = a.cu_q != nullptr;
  const int64_t queries = packed ? a.total_queries : a.queries, keys = packed ? a.total_keys : a.keys;
  const TensorMap q = map_of(a, a.q, a.q_rows, queries, a.heads, M);
  const TensorMap k = map_of(a, a.k, a.k_rows, keys, a.key_heads, Tile::kKeys);
  const TensorMap v = map_of(a, a.v, a.v_rows, keys, a.key_heads, Tile::kKeys);
  const TensorMap grad = map_of(a, a.grad_out, a.grad_out_rows, queries, a.heads, M);

  const dim3 by_queries(unsigned(a.query_blocks) * unsigned(a.batch * a.heads));
  const dim3 by_keys(unsigned(a.key_blocks) * unsigned(a.batch * a.key_heads));
  TF_LAUNCH((attention_backward_wgmma_prepare<T, D, M>), by_queries, dim3(256), 0, stream, a);
  TF_LAUNCH((attention_backward_wgmma_kernel<T, D, M>), by_keys, dim3(Tile::kThreads), Tile::kBytes, stream, a, q, k, v,
            grad);
  TF_LAUNCH((attention_backward_wgmma_finish<T, D, M>), by_queries, dim3(256), 0, stream, a);
}

template <class T>
void choose(const AttentionBackward& a, Stream stream) {
  if (a.dim == 64) return launch<T, 64, 128>(a, stream);
  return tile_of(a) == 80 ? launch<T, 128, 80>(a, stream) : launch<T, 128, 64>(a, stream);
}

bool fits_tma(const void* base, const Rows& rows) {
  const auto fits = [](int64_t stride) { return stride > 0 && stride % 8 == 0 && stride < (int64_t(1) << 39); };
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && fits(rows.row) && fits(rows.head) &&
         (rows.batch == 0 || fits(rows.batch));
}

bool fits_vectors(const void* base, const Rows& rows) {
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && rows.batch % 8 == 0 && rows.head % 8 == 0 && rows.row % 8 == 0;
}

}  // namespace

const char* attention_backward_wgmma_refuses(const AttentionBackward& a) {
  if (a.dtype == DType::f32) return "wgmma: float32 data, where tensor cores would round to TF32";
  if (a.dim != 64 && a.dim != 128) return "wgmma: head dims other than 64 and 128";
  if (!is_plain(a)) return "wgmma: biases, masks, soft cap, dropout and scales that are not positive";
  if (a.dbias || a.drelative) return "wgmma: gradients of biases";
  if (a.batch == 0 || a.queries == 0 || a.keys == 0) return "wgmma: empty tensors";
  if (!fits_tma(a.q, a.q_rows) || !fits_tma(a.k, a.k_rows) || !fits_tma(a.v, a.v_rows) ||
      !fits_tma(a.grad_out, a.grad_out_rows) || !fits_vectors(a.out, a.out_rows) || !fits_vectors(a.dq, a.dq_rows) ||
      !fits_vectors(a.dk, a.dk_rows) || !fits_vectors(a.dv, a.dv_rows)) {
    return "wgmma: tensors whose base and strides are not multiples of 16 bytes, or that repeat rows";
  }
  const int64_t blocks = int64_t(a.batch) * a.heads * (std::max(a.queries, a.keys) / 64 + 1);
  if (blocks > INT32_MAX) return "wgmma: more blocks than a grid has";
  return nullptr;
}

int64_t attention_backward_wgmma_scratch(const AttentionBackward& a) {
  return tiles_of(a) * (tile_of(a) * (a.dim + 2) + BackwardTile<64, 128>::kParts) + 4;
}

void attention_backward_wgmma(const AttentionBackward& a, Stream stream) {
  a.dtype == DType::bf16 ? choose<bf16_t>(a, stream) : choose<half_t>(a, stream);
}

}  // namespace tf::cuda
