// Attention of a few queries on a cache of keys and values, split over the GPU (Dao et al., "Flash-Decoding for
// long-context inference", 2023), in one launch: the blocks whose keys include the new rows append them, and the last
// block to finish joins the parts of the splits. The order of every sum depends only on shapes and the GPU.
#include <algorithm>

#include "attention_decode.cuh"

namespace tf::cuda {
namespace {

constexpr int kSplitKeys = 64;  // per block at least: fewer are not worth a block
constexpr int kBlocks = 4;      // resident per multiprocessor

struct Plan {
  bool plain;
  int width, vectors, rows, lanes;  // elements per vector; vectors of a key and rows per thread; threads per key
};

int rows_of(const AttentionDecode& p) { return p.max_seqlen_q * (p.heads / p.key_heads); }

bool in_vectors(const void* data, const RowStrides& rows, int width) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && rows.batch % width == 0 && rows.head % width == 0 &&
         rows.row % width == 0;
}

Plan plan_of(const AttentionDecode& p) {
  Plan plan;
  plan.width = p.dtype == DType::f32 ? 4 : 8;
  plan.plain = p.dim % plan.width == 0 && p.bias_type == BiasType::none && !p.mask && !p.relative_bias &&
               p.softcap == 0.f &&
               in_vectors(p.query, p.query_strides, plan.width) && in_vectors(p.key, p.key_strides, plan.width) &&
               in_vectors(p.value, p.value_strides, plan.width) &&
               in_vectors(p.new_key, p.new_key_strides, plan.width) &&
               in_vectors(p.new_value, p.new_value_strides, plan.width);
  const int vectors = (p.dim + plan.width - 1) / plan.width;
  plan.vectors = vectors > 32 ? 2 : 1;
  plan.rows = !plan.plain ? 2 : rows_of(p) == 1 ? 1 : 4;
  plan.lanes = 1;
  while (plan.lanes * plan.vectors < vectors) plan.lanes *= 2;
  return plan;
}

int chunks_of(const AttentionDecode& p, const Plan& plan) { return (rows_of(p) + plan.rows - 1) / plan.rows; }

template <class T, int kRows, int kVectors, int kKeys, bool kPlain>
void run(const AttentionDecode& p, const Plan& plan, Stream stream) {
  const int tiles = p.batch * p.key_heads, chunks = chunks_of(p, plan);
  uint32_t* counters = p.splits > 1 ? p.arrivals : nullptr;
  const int states = kDecodeWarps * kRows * (plan.lanes * kVectors * plan.width + 2);
  const int bytes = int(sizeof(float)) * std::max(states, counters ? kRows * (kMostSplits + 2) : 0);
  TF_LAUNCH((attention_decode_kernel<T, kRows, kVectors, kKeys, kPlain>), dim3(tiles, p.splits, chunks),
            dim3(kDecodeThreads), bytes, stream, p, plan.lanes, counters);
  if (p.splits == 1 || counters) return;
  TF_LAUNCH((attention_decode_join_kernel<T>), dim3(tiles, rows_of(p)), dim3(kDecodeThreads),
            int(sizeof(float)) * (kMostSplits + 2), stream, p);
}

template <class T>
void launch(const AttentionDecode& p, Stream stream) {
  const Plan plan = plan_of(p);
  if constexpr (sizeof(T) == 4) {
    if (plan.vectors == 2) {
      if (!plan.plain) return run<T, 2, 2, 2, false>(p, plan, stream);
      return plan.rows == 1 ? run<T, 1, 2, 4, true>(p, plan, stream) : run<T, 4, 2, 2, true>(p, plan, stream);
    }
  }
  if (!plan.plain) return run<T, 2, 1, 4, false>(p, plan, stream);
  return plan.rows == 1 ? run<T, 1, 1, 8, true>(p, plan, stream) : run<T, 4, 1, 4, true>(p, plan, stream);
}

}  // namespace

const char* attention_decode_refuses(const AttentionDecode& p) {
  if (p.threshold) return "decode attention has no dropout";
  if (p.dim > 256) return "head dim over 256";
  if (rows_of(p) > kDecodeRows) return "more than 16 queries, counting those of heads that share keys";
  if (int64_t(p.batch) * p.key_heads >= INT64_C(1) << 31) return "too many sequences times key heads";
  if (p.new_key && p.cu_seqlens_q) return "new keys for unpadded sequences";
  return nullptr;
}

int32_t attention_decode_splits(const AttentionDecode& p) {
  const int64_t tiles = int64_t(p.batch) * p.key_heads * chunks_of(p, plan_of(p)), sms = multiprocessors();
  if (tiles >= 2 * sms) return 1;
  const int64_t most = std::min<int64_t>((p.max_seqlen_k + kSplitKeys - 1) / kSplitKeys, kMostSplits);
  return int32_t(std::max<int64_t>(1, std::min(most, kBlocks * sms / tiles)));
}

int64_t attention_decode_scratch(const AttentionDecode& p) {
  return p.splits > 1 ? int64_t(p.batch) * p.key_heads * rows_of(p) * p.splits * (p.dim + 2) : 0;
}

int64_t attention_decode_arrivals(const AttentionDecode& p) {
  return p.splits > 1 ? int64_t(p.batch) * p.key_heads * chunks_of(p, plan_of(p)) : 0;
}

void attention_decode(const AttentionDecode& p, Stream stream) {
  switch (p.dtype) {
    case DType::f32: return launch<float>(p, stream);
    case DType::bf16: return launch<bf16_t>(p, stream);
    case DType::f16: return launch<half_t>(p, stream);
  }
}

}  // namespace tf::cuda
