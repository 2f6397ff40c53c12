// One shape of Hopper's attention forward kernel as a library, for wgmma_tiles.py, which sets the macros SHAPE_*.
#include <algorithm>

#include "attention_forward_wgmma.cuh"
#include "attention_tensor_map.cuh"

using namespace tf::cuda;

using Shape =
    ForwardWgmmaShape<bf16_t, SHAPE_HEAD_DIM, SHAPE_QUERIES, SHAPE_KEYS, SHAPE_CAUSAL, SHAPE_LAZY, SHAPE_TURNS>;

// query, key, value, out: (batch, heads, length, head dim), contiguous, bfloat16. lse: (batch, heads, length).
// counters: two zeros. Returns 0, or 1 when the launch was refused.
extern "C" int run(const void* query, const void* key, const void* value, void* out, float* lse, int32_t* counters,
                   int32_t batch, int32_t heads, int32_t length, float scale, void* stream) {
  const int64_t row = Shape::D, head = row * length;
  AttentionForward a{};
  a.dtype = tf::DType::bf16;
  a.batch = batch;
  a.heads = a.key_heads = heads;
  a.dim = Shape::D;
  a.max_seqlen_q = a.max_seqlen_k = length;
  const tf::RowStrides strides{head * heads, head, row};
  ForwardWgmma p{};
  p.out = out;
  p.lse = lse;
  p.out_strides = strides;
  p.lse_batch = int64_t(heads) * length;
  p.lse_head = length;
  p.batch = batch;
  p.heads = heads;
  p.groups = 1;
  p.batch_heads = batch * heads;
  p.max_seqlen_q = p.max_seqlen_k = length;
  p.blocks = (length + Shape::BM - 1) / Shape::BM;
  p.tiles = p.blocks * p.batch_heads;
  p.heads_together = int32_t(std::clamp<int64_t>((32 << 20) / (4 * head), 1, p.batch_heads));
  p.left = 1 << 30;
  p.right = Shape::WINDOWED ? 0 : 1 << 30;
  p.scale_log2 = scale * 1.44269504088896341f;
  const int32_t grid = std::min(p.tiles, multiprocessors());
  if (Shape::WINDOWED && grid < p.tiles) p.counters = counters;
  try {
    TF_LAUNCH((attention_forward_wgmma_kernel<Shape>), dim3(unsigned(grid)), dim3(Shape::THREADS),
              forward_wgmma_shared_bytes<Shape>(), stream, map_of(a, query, strides, query_extents(a), Shape::BM),
              map_of(a, key, strides, key_extents(a), Shape::BN), map_of(a, value, strides, key_extents(a), Shape::BN),
              p);
  } catch (const std::exception&) {
    return 1;
  }
  return 0;
}
