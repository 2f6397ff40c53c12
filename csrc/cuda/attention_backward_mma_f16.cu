// The kernels of attention_backward_mma.cu for float16: a file of their own, so that both compile in parallel.
#include "attention_backward_mma_launch.cuh"

namespace tf::cuda {

template void attention_backward_mma_of<half_t>(const AttentionBackward&, Stream);

}  // namespace tf::cuda
