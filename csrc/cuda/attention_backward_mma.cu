// Which calls the attention backward on mma.sync takes, and its kernels for bfloat16.
#include "attention_backward_mma_launch.cuh"

namespace tf::cuda {

extern template void attention_backward_mma_of<half_t>(const AttentionBackward&, Stream);

const char* attention_backward_mma_refuses(const AttentionBackward& a) {
  using namespace backward_mma;
  if (a.dtype == DType::f32) return "mma: float32 data, where tensor cores would round to TF32";
  if (a.dim > 256) return "mma: head dims over 256";
  const int64_t rows = std::max((int64_t(a.max_seqlen_q) + kDeltaRows - 1) / kDeltaRows * a.heads,
                                (int64_t(a.max_seqlen_k) + kBackwardRows - 1) / kBackwardRows * a.key_heads);
  const int64_t blocks = (int64_t(a.max_seqlen_q) + kBackwardRows - 1) / kBackwardRows;
  const int64_t tiles = a.dbias ? blocks * ((a.max_seqlen_k + 15) / 16) : 1;
  if (std::max(rows, tiles * a.heads) * a.batch > INT32_MAX) return "mma: more blocks than a grid has";
  return nullptr;
}

int64_t attention_backward_mma_scratch(const AttentionBackward& a) {
  return center_floats(a) + backward_mma::distance_floats(a);
}

void attention_backward_mma(const AttentionBackward& a, Stream stream) {
  if (a.dtype == DType::bf16) {
    attention_backward_mma_of<bf16_t>(a, stream);
  } else {
    attention_backward_mma_of<half_t>(a, stream);
  }
}

}  // namespace tf::cuda
