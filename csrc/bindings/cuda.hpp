// What the bindings of CUDA kernels use of torch, without CUDA's headers.
//
// A binding csrc/bindings/cuda_<op>.cpp is compiled in three ways: with the kernels of nvcc (its ops are registered for
// CUDA tensors), with the emulator of tests/native/emulator (for CPU tensors), and without kernels, only for its
// schemas, so that every build knows the ops:
//
//   #include "cuda.hpp"
//   #if TF_CUDA_KERNELS
//   namespace tf::cuda::bindings {  // not the namespace of the launchers, whose names it reuses
//   void norm_forward(Tensor x, ...) { Device device(x); ... cuda::norm_forward(arguments, device.stream()); }
//   }
//   TF_CUDA_IMPL(m) { m.impl("cuda_norm_forward", TORCH_BOX(&tf::cuda::bindings::norm_forward)); }
//   #endif
//   TF_CUDA_SCHEMA(m) { m.def("cuda_norm_forward(Tensor x, ...) -> ()"); }
#pragma once
#include "tensors.hpp"

#if defined(TF_EMULATE) || defined(TF_WITH_CUDA)
#define TF_CUDA_KERNELS 1
#else
#define TF_CUDA_KERNELS 0
#endif
#if defined(TF_EMULATE) || defined(TF_CPU_TENSORS)  // in tests: the emulator, and the stand-in for CUDA's runtime
#define TF_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(transformer_fast, CPU, m)
// The main library has the schemas, and is loaded first.
#define TF_CUDA_SCHEMA(m) \
  [[maybe_unused]] static void schema_of_the_main_library(torch::stable::detail::StableLibrary& m)
#else
#define TF_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(transformer_fast, CUDA, m)
#define TF_CUDA_SCHEMA(m) STABLE_TORCH_LIBRARY_FRAGMENT(transformer_fast, m)
#endif

#if TF_CUDA_KERNELS
#include <cstring>
#include <initializer_list>

#include "cuda/stream.hpp"
#ifndef TF_EMULATE
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace tf::cuda {

// While it lives, the tensor's device is torch's current device.
#ifdef TF_EMULATE
class Device {
 public:
  explicit Device(const Tensor&) {}
  Device(const Device&) = delete;
  ~Device() { forget_tensors(); }
  int32_t index() const { return 0; }
  void* stream() const { return nullptr; }
};
#else
// A function of torch's CUDA library, looked up at run time so that this library loads where torch has none. The lookup
// uses that library's own handle: Python loads it with RTLD_LOCAL, so global lookups do not find the function.
inline void* torch_cuda_function(const char* name) {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* function = library ? dlsym(library, name) : nullptr;
  if (library) dlclose(library);  // torch keeps it loaded
  return function ? function : dlsym(RTLD_DEFAULT, name);
}

class Device {
 public:
  explicit Device(const Tensor& t) : index_(t.get_device_index()), guard_(index_) {}
  int32_t index() const { return index_; }
  // torch's current stream on this device.
  void* stream() const {
    using Get = int32_t (*)(int32_t, void**);
    static const Get get = reinterpret_cast<Get>(torch_cuda_function("aoti_torch_get_current_cuda_stream"));
    STD_TORCH_CHECK(get != nullptr, "transformer_fast: this torch was built without CUDA");
    void* stream = nullptr;
    STD_TORCH_CHECK(get(index_, &stream) == 0, "transformer_fast: no current CUDA stream on device ", index_);
    return stream;
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};
#endif

// A grid has at least one block.
inline void check_some(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.numel() > 0, "transformer_fast: ", name, ": wanted at least one element, got none");
}

// Scratch memory on the device of `like`. It is not initialised; under the emulator it holds NaN.
inline Tensor new_scratch(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  Tensor t = torch::stable::new_empty(like, shape, dtype);
#ifdef TF_EMULATE
  std::memset(t.mutable_data_ptr(), 0xff, size_t(t.numel()) * t.element_size());
#endif
  return t;
}

// (kCounters,): counters for the blocks of a launch, zeros before and after it. Launches on one stream run one after
// another, so each stream has its own counters. In a graph capture they are memory of the graph's own pool, cleared
// whenever the graph runs. null where the stream is not known: a kernel must do without them.
constexpr int32_t kCounters = 2048;
int32_t* counters_of(const Tensor& like, const Device& device);

}  // namespace tf::cuda
#endif
