// The CUDA kernel that rotates new queries and keys and appends to a cache; its arguments are those of the CPU kernel.
#pragma once
#include "cpu/rotary_append.hpp"

namespace tf::cuda {

using Stream = void*;  // cudaStream_t

void rotary_append(const RotaryAppend&, Stream);

}  // namespace tf::cuda
