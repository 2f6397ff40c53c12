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
  if (cudaStreamGetCaptureInfo(s, &status, &capture) == cudaSuccess) {
    // cudaStreamGetId would end the capture. The handle serves, as the stream lives as long as the capture.
    if (status == cudaStreamCaptureStatusActive) return {true, capture, reinterpret_cast<uintptr_t>(stream)};
    // A handle may be used again after its stream; an id is not.
    if (status == cudaStreamCaptureStatusNone && cudaStreamGetId(s, &id) == cudaSuccess) return {true, 0, id};
  }
  cudaGetLastError();  // else the next launch would report it
  return {false, 0, 0};
#endif
}

void fill_zero_async(void* global, size_t bytes, Stream stream) { fill_zero(global, bytes, stream); }

}  // namespace tf::cuda
