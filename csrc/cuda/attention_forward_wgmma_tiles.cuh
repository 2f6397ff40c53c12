// The tiles of queries of attention_forward_wgmma.cuh: how they are numbered, assigned to blocks and passed to warps.
#pragma once
#include "attention.hpp"
#include "ptx.cuh"

namespace tf::cuda {

struct ForwardWgmma {
  const int32_t *cu_seqlens_q, *cu_seqlens_k, *key_lengths;
  void* out;
  float* lse;  // or null
  RowStrides out_strides;
  int64_t lse_batch, lse_head;
  int32_t batch, heads, groups, batch_heads;  // groups: query heads per key head
  int32_t max_seqlen_q, max_seqlen_k;
  int32_t blocks, tiles, heads_together;  // blocks: of the longest sequence; tiles: blocks * batch_heads
  // (2,): how many tiles blocks have taken, how many blocks found none left; zeros before and after. null: block b
  // takes tiles b, b + blocks, ...
  int32_t* counters;
  int32_t left, right;  // of the window; kUnlimited where unlimited
  bool bottom_right;
  float scale_log2;  // scale * log2(e)
};

struct ForwardWgmmaTile {
  int32_t b, h, first_q, first_k, queries, keys, offset;  // query i has position i + offset
  int32_t first_row;                                      // within its sequence
  int32_t begin, end;                                     // blocks of keys that some row sees
  int32_t last;                                           // no tile: there are no more
};

// Unpadded tensors: the sequence where a search starts, and the number of blocks of rows before it.
struct ForwardWgmmaSearch {
  int32_t b, blocks;
};

// Finds the sequence and block of rows of tile `index` of unpadded tensors. All lanes of a warp search, one sequence
// per lane. Indices rise from call to call, so `search` moves on. false: there are no more tiles.
template <class S>
TF_DEVICE bool forward_wgmma_unpadded(const ForwardWgmma& a, int32_t index, ForwardWgmmaSearch& search, int32_t& b,
                                    int32_t& block, int32_t& blocks) {
  const int32_t lane = threadIdx.x % 32, wanted = index / a.heads;
  for (; search.b < a.batch; search.b += 32) {
    int32_t mine = 0;
    b = search.b + lane;
    if (b < a.batch) mine = (load(a.cu_seqlens_q + b + 1) - load(a.cu_seqlens_q + b) + S::BM - 1) / S::BM;
    int32_t end = search.blocks + mine;  // becomes the number of blocks through this lane's sequence
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int32_t before = __shfl_up_sync(0xffffffff, end, distance);
      if (lane >= distance) end += before - search.blocks;
    }
    const unsigned past = __ballot_sync(0xffffffff, end > wanted);
    if (past != 0) {
      const int found = __ffs(past) - 1;
      b = search.b + found;
      blocks = __shfl_sync(0xffffffff, mine, found);
      block = wanted - __shfl_sync(0xffffffff, end - mine, found);
      return true;
    }
    search.blocks = __shfl_sync(0xffffffff, end, 31);
  }
  return false;
}

// Tile `index`; false: there are no more. Padded tensors: tiles go through `heads_together` heads block by block, so
// that their keys and values stay in the L2 cache. Unpadded tensors: through the heads of a sequence. Windowed calls
// start with the last rows, the longest tiles of a causal call.
template <class S>
TF_DEVICE bool forward_wgmma_tile(const ForwardWgmma& a, int32_t index, ForwardWgmmaSearch& search,
                                  ForwardWgmmaTile& t) {
  if (index >= a.tiles) return false;
  int32_t block, blocks = a.blocks;
  if (a.cu_seqlens_q != nullptr) {
    if (!forward_wgmma_unpadded<S>(a, index, search, t.b, block, blocks)) return false;
    t.h = index % a.heads;
    t.first_q = load(a.cu_seqlens_q + t.b);
    t.first_k = load(a.cu_seqlens_k + t.b);
    t.queries = load(a.cu_seqlens_q + t.b + 1) - t.first_q;
    t.keys = load(a.cu_seqlens_k + t.b + 1) - t.first_k;
  } else {
    const int32_t group = index / (blocks * a.heads_together);
    const int32_t size = min(a.heads_together, a.batch_heads - group * a.heads_together);
    const int32_t rest = index - group * blocks * a.heads_together;
    block = rest / size;
    const int32_t bh = group * a.heads_together + rest - block * size;
    t.b = bh / a.heads;
    t.h = bh - t.b * a.heads;
    t.first_q = t.first_k = 0;
    t.queries = a.max_seqlen_q;
    t.keys = a.max_seqlen_k;
    if (a.key_lengths != nullptr) t.keys = min(max(load(a.key_lengths + t.b), 0), t.keys);
  }
  t.first_row = (S::WINDOWED ? blocks - 1 - block : block) * S::BM;
  t.offset = a.bottom_right ? t.keys - t.queries : 0;
  int32_t begin = 0, end = t.keys;
  if (S::WINDOWED) {
    const int32_t last = min(t.first_row + S::BM, t.queries) - 1;
    begin = max(t.first_row + t.offset - a.left, 0);
    end = min(end, last + t.offset + a.right + 1);
  }
  t.begin = begin / S::BN;
  t.end = end > begin ? (end + S::BN - 1) / S::BN : t.begin;
  return true;
}

// The tile after `index`, for the whole warp: the next one that no block has taken, or without counters index + grid.
TF_DEVICE int32_t forward_wgmma_next(const ForwardWgmma& a, int32_t index) {
  const int32_t grid = gridDim.x;
  if (a.counters == nullptr) return index + grid;
  int32_t taken = 0;
  if (threadIdx.x % 32 == 0) taken = atomicAdd(a.counters, 1);
  return grid + __shfl_sync(0xffffffff, taken, 0);
}

// Called by one thread of a block that takes no more tiles. The last block resets the counters for the next launch.
TF_DEVICE void forward_wgmma_done(const ForwardWgmma& a) {
  if (a.counters == nullptr) return;
  __threadfence();
  if (atomicAdd(a.counters + 1, 1) != int32_t(gridDim.x) - 1) return;
  store(a.counters, 0);
  store(a.counters + 1, 0);
}

constexpr int kTileWords = sizeof(ForwardWgmmaTile) / sizeof(int32_t);

TF_DEVICE void post_tile(ForwardWgmmaTile* shared, const ForwardWgmmaTile& t) {
  const int32_t words[kTileWords] = {t.b,      t.h,         t.first_q, t.first_k, t.queries, t.keys,
                                     t.offset, t.first_row, t.begin,   t.end,     t.last};
#pragma unroll
  for (int i = 0; i < kTileWords; ++i) store_shared(reinterpret_cast<int32_t*>(shared) + i, words[i]);
}

// Read by all lanes and passed through shuffles, so that the compiler knows the tile to be uniform in the warp.
TF_DEVICE ForwardWgmmaTile read_tile(const ForwardWgmmaTile* shared) {
  const int lane = threadIdx.x % 32;
  const int32_t word = load_shared(reinterpret_cast<const int32_t*>(shared) + min(lane, kTileWords - 1));
  auto of = [&](int i) { return __shfl_sync(0xffffffff, word, i); };
  return {of(0), of(1), of(2), of(3), of(4), of(5), of(6), of(7), of(8), of(9), of(10)};
}

}  // namespace tf::cuda
