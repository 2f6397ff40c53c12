// Chooses the kernels of a backward call on mma.sync and launches them: delta, the key side, the bias, the query side.
#pragma once
#include <algorithm>

#include "attention_backward_bias_mma.cuh"

namespace tf::cuda {
namespace backward_mma {

constexpr int64_t kL2Bytes = 32 << 20;  // budget for the tiles streamed by the heads that run together
constexpr int kFewKeys = 128;           // up to this many keys do not average out the output's rounding in delta

inline bool is_aligned(const AttentionBackward& a) {
  return a.dim % 8 == 0 && moves_by_16_bytes(a.query, a.query_strides) &&
         moves_by_16_bytes(a.key, a.key_strides) && moves_by_16_bytes(a.value, a.value_strides) &&
         moves_by_16_bytes(a.out, a.out_strides) && moves_by_16_bytes(a.grad_out, a.grad_out_strides) &&
         moves_by_16_bytes(a.dq, a.dq_strides) && moves_by_16_bytes(a.dk, a.dk_strides) &&
         moves_by_16_bytes(a.dv, a.dv_strides);
}

inline BackwardCall call_of(const AttentionBackward& a, int rows, int length, int heads, int64_t streamed) {
  const int64_t bytes = std::max<int64_t>(1, 4 * streamed * a.dim), batch_heads = int64_t(a.batch) * heads;
  const int64_t together = std::max<int64_t>(1, kL2Bytes / bytes) * (heads / a.key_heads);
  BackwardCall call{a, (length + rows - 1) / rows, int32_t(std::min(together, batch_heads)), is_aligned(a), false,
                    a.scratch};
  call.scratch = a.scratch + center_floats(a);
  return call;
}

template <class T, int D, Side SIDE, bool RICH, Wanted WANTED>
void launch(const BackwardCall& call, Stream stream) {
  using Memory = BackwardMemory<D, SIDE, RICH, WANTED>;
  const int heads = SIDE == Side::keys ? call.key_heads : call.heads;
  const size_t bytes = call.drelative_bias && SIDE == Side::queries ? Memory::kBytesWithScores : Memory::kBytes;
  const dim3 grid(unsigned(call.blocks) * call.batch * heads);
  TF_LAUNCH((attention_backward_kernel<T, D, SIDE, RICH, WANTED>), grid, dim3(kBackwardThreads), bytes, stream, call);
}

template <class T, int D>
void bias_gradient(const BackwardCall& call, Stream stream) {
  using Tile = BackwardTile<D, true>;
  const int counts[4] = {call.batch, call.heads, (call.max_seqlen_q + kBackwardRows - 1) / kBackwardRows,
                         (call.max_seqlen_k + Tile::kColumns - 1) / Tile::kColumns};
  BiasTiles tiles;
  unsigned blocks = 1;
  for (int axis = 0; axis < 4; ++axis) {
    const bool summed = call.dbias_strides[axis] == 0;
    tiles.own[axis] = summed ? 1 : counts[axis];
    tiles.each[axis] = summed ? counts[axis] : 1;
    blocks *= unsigned(tiles.own[axis]);
  }
  const size_t scores = 4 * kBackwardRows * (Tile::kColumns + 1);
  const size_t bytes = std::max<size_t>(2 * 2 * (Tile::kResident + Tile::kStreamed), scores);
  TF_LAUNCH((attention_backward_bias_kernel<T, D>), dim3(blocks), dim3(kBackwardThreads), bytes, stream, call, tiles);
}

inline bool bias_broadcasts(const AttentionBackward& a) {
  const int counts[4] = {a.batch, a.heads, a.max_seqlen_q, a.max_seqlen_k};
  for (int axis = 0; axis < 4; ++axis)
    if (a.dbias_strides[axis] == 0 && counts[axis] > 1) return true;
  return false;
}

template <class T, int D, bool RICH>
void gradients(const AttentionBackward& a, Stream stream) {
  const int64_t streamed = int64_t(a.heads / a.key_heads) * a.max_seqlen_q;
  BackwardCall keys = call_of(a, kBackwardRows, a.max_seqlen_k, a.key_heads, streamed);
  BackwardCall queries = call_of(a, kBackwardRows, a.max_seqlen_q, a.heads, a.max_seqlen_k);
  // Where a row sees one key, dropout scales and rounds its value: the score would get a gradient that should be zero.
  const bool may_be_alone = a.threshold && (a.mask || a.bias_type != BiasType::none || a.relative_bias);
  if (a.dbias || a.drelative_bias || a.max_seqlen_k <= kFewKeys || may_be_alone) {
    BackwardCall delta = queries;
    delta.delta_only = true;
    delta.dbias = delta.drelative_bias = nullptr;
    launch<T, D, Side::queries, true, Wanted::all>(delta, stream);
  } else {
    const BackwardCall delta = call_of(a, kDeltaRows, a.max_seqlen_q, a.heads, 0);
    const dim3 grid(unsigned(delta.blocks) * a.batch * a.heads);
    TF_LAUNCH((attention_backward_delta_kernel<T>), grid, dim3(kBackwardThreads), 0, stream, delta);
  }
  if constexpr (D <= 128) {
    launch<T, D, Side::keys, RICH, Wanted::all>(keys, stream);
  } else {
    launch<T, D, Side::keys, RICH, Wanted::key>(keys, stream);
    launch<T, D, Side::keys, RICH, Wanted::value>(keys, stream);
  }
  if constexpr (RICH) {
    if (a.dbias && bias_broadcasts(a)) {
      bias_gradient<T, D>(queries, stream);
      queries.dbias = nullptr;
    }
  }
  if (a.drelative_bias) fill_zero(queries.scratch, size_t(distance_floats(a)) * sizeof(float), stream);
  launch_center<T, D>(a, queries.center, stream);
  launch<T, D, Side::queries, RICH, Wanted::all>(queries, stream);
  if (a.drelative_bias) {
    const dim3 grid((unsigned(a.heads) * (2 * a.reach + 1) + kBackwardThreads - 1) / kBackwardThreads);
    TF_LAUNCH(attention_backward_distance_kernel, grid, dim3(kBackwardThreads), 0, stream, queries);
  }
}

}  // namespace backward_mma

template <class T>
void attention_backward_mma_of(const AttentionBackward& a, Stream stream) {
  const bool plain = is_plain(a) && backward_mma::is_aligned(a);
  if (a.dim <= 64)
    return plain ? backward_mma::gradients<T, 64, false>(a, stream) : backward_mma::gradients<T, 64, true>(a, stream);
  if (a.dim <= 128)
    return plain ? backward_mma::gradients<T, 128, false>(a, stream) : backward_mma::gradients<T, 128, true>(a, stream);
  return backward_mma::gradients<T, 256, true>(a, stream);
}

}  // namespace tf::cuda
