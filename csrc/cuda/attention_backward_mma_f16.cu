// The kernels of attention_backward_mma.cu for float16, apart so that both compile side by side.
#include "attention_backward_mma_launch.cuh"

namespace tf::cuda {

template void attention_backward_mma_of<half_t>(const AttentionBackward&, Stream);

}  // namespace tf::cuda
