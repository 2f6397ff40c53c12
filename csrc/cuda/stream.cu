#include "stream.hpp"

#include "simt.cuh"

namespace tf::cuda {

StreamIdentity identity_of(Stream stream) {
#ifdef TF_EMULATE
  return {true, 0, 0};
#else
  const auto s = static_cast<cudaStream_t>(stream);
  cudaStreamCaptureStatus status;
  unsigned long long id = 0, capture = 0;
  if (cudaStreamGetCaptureInfo(s, &status, &capture) != cudaSuccess || cudaStreamGetId(s, &id) != cudaSuccess) {
    cudaGetLastError();  // else the next launch would report it
    return {false, 0, 0};
  }
  return {true, id, status == cudaStreamCaptureStatusActive ? capture : 0};
#endif
}

void fill_zero_async(void* global, size_t bytes, Stream stream) { fill_zero(global, bytes, stream); }

}  // namespace tf::cuda
