// Chooses the tile of a forward call on mma.sync and launches it.
#include "attention_forward_mma.cuh"

#include <algorithm>

namespace tf::cuda {
namespace {

constexpr int64_t kL2Bytes = 32 << 20;  // budget for the keys and values of the heads that run together

bool is_aligned(const AttentionForward& a) {
  return a.dim % 8 == 0 && moves_by_16_bytes(a.query, a.query_strides) &&
         moves_by_16_bytes(a.key, a.key_strides) && moves_by_16_bytes(a.value, a.value_strides) &&
         moves_by_16_bytes(a.out, a.out_strides);
}

bool has_little_shared_memory() {  // 100 KB per multiprocessor, not more
  const int capability = compute_capability();
  return capability == 86 || capability == 89 || capability / 10 == 12;
}

template <class Tile>
void launch(const AttentionForward& a, Stream stream) {
  const int32_t blocks = (a.max_seqlen_q + Tile::kRows - 1) / Tile::kRows, batch_heads = a.batch * a.heads;
  const int64_t bytes = std::max<int64_t>(1, int64_t(4) * a.max_seqlen_k * a.dim);
  const int64_t together = std::max<int64_t>(1, kL2Bytes / bytes) * (a.heads / a.key_heads);
  const BlockOrder order{blocks, batch_heads, int32_t(std::min<int64_t>(together, batch_heads)), a.window_right >= 0};
  const float to_log2 = Tile::RICH ? kLog2e : a.scale * kLog2e;
  TF_LAUNCH((attention_forward_mma_kernel<Tile>), dim3(unsigned(blocks) * unsigned(batch_heads)),
            dim3(Tile::kThreads), Tile::kTileBytes + sizeof(Program<typename Tile::T>), stream, a, order, to_log2,
            is_aligned(a));
}

// Tiles by their bottleneck. A plain warp has 32 rows, so that each operand of K or V that ldmatrix loads serves two
// products: 160 bytes of shared memory per product, 1.25 of the 2 cycles that a product takes on an A100. D 128 takes
// 255 registers and 64 KB, two blocks per multiprocessor; with 100 KB of shared memory, N = 32 keeps it at two. Past
// D 128 the output of 16 rows takes half the registers, and ldmatrix, 256 bytes per product, is the bound. Expected, of
// the mma.sync peak: 55-65% at D 64 and 128, as FlashAttention-2; 35-40% past 128. Rich tiles spend their time on
// features: 16 rows keep the loads in registers, three blocks per multiprocessor hide them. Not yet run on a GPU.
template <class T>
void choose(const AttentionForward& a, Stream stream) {
  if (is_plain(a) && is_aligned(a)) {
    if (a.dim <= 32) return launch<ForwardTile<T, 32, 2, 64, false, 3>>(a, stream);
    if (a.dim <= 64) return launch<ForwardTile<T, 64, 2, 64, false, 2>>(a, stream);
    if (a.dim <= 128 && has_little_shared_memory()) return launch<ForwardTile<T, 128, 2, 32, false, 2>>(a, stream);
    if (a.dim <= 128) return launch<ForwardTile<T, 128, 2, 64, false, 2>>(a, stream);
    return launch<ForwardTile<T, 256, 1, 32, false, 2>>(a, stream);
  }
  if (a.dim <= 64) return launch<ForwardTile<T, 64, 1, 64, true, 3>>(a, stream);
  if (a.dim <= 128) return launch<ForwardTile<T, 128, 1, 64, true, 2>>(a, stream);
  return launch<ForwardTile<T, 256, 1, 32, true, 2>>(a, stream);
}

}  // namespace

const char* attention_forward_mma_refuses(const AttentionForward& a) {
  if (a.dtype == DType::f32) return "mma: float32 data, where tensor cores would round to TF32";
  if (a.dim > 256) return "mma: head dims over 256";
  const int64_t rows = int64_t(a.batch) * a.heads * ((int64_t(a.max_seqlen_q) + 63) / 64);
  if (rows > INT32_MAX) return "mma: more blocks of queries than a grid has";
  return nullptr;
}

void attention_forward_mma(const AttentionForward& a, Stream stream) {
  if (a.dtype == DType::bf16)
    choose<bf16_t>(a, stream);
  else
    choose<half_t>(a, stream);
}

}  // namespace tf::cuda
