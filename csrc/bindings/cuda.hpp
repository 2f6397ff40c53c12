// What the bindings of CUDA kernels need from torch, without CUDA's headers.
//
// A binding csrc/bindings/cuda_<op>.cpp is compiled three times over: with the kernels of nvcc (its ops are registered
// for CUDA tensors), with the emulator of tests/native/emulator (for CPU tensors), and without any kernel, for its
// schemas alone, so that every build knows the ops:
//
//   #include "cuda.hpp"
//   #if TF_CUDA_KERNELS
//   namespace tf::cuda::bindings {  // not the namespace of the launchers: names would be mixed up
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
// The main library has the schemas; it is loaded before these are.
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

// Makes the tensor's device torch's current one while it lives.
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
// A function of torch's CUDA library, looked up at run time so that this library loads where torch has none. It is
// looked up in that library's own handle, as Python loads it with RTLD_LOCAL: global lookups do not find it.
inline void* torch_cuda_function(const char* name) {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* function = library ? dlsym(library, name) : nullptr;
  if (library) dlclose(library);  // it stays loaded: torch holds it
  return function ? function : dlsym(RTLD_DEFAULT, name);
}

class Device {
 public:
  explicit Device(const Tensor& t) : index_(t.get_device_index()), guard_(index_) {}
  int32_t index() const { return index_; }
  // torch's current stream on the device.
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

// Memory for a kernel's own use, on the device of `like`. It is not initialised; under the emulator it holds NaN.
inline Tensor new_scratch(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  Tensor t = torch::stable::new_empty(like, shape, dtype);
#ifdef TF_EMULATE
  std::memset(t.mutable_data_ptr(), 0xff, size_t(t.numel()) * t.element_size());
#endif
  return t;
}

// kCounters integers with which the blocks of a launch agree on something: zero before a launch and after it. Launches
// of one stream follow one another, so each stream has its own; in a graph capture they are memory of the graph's own
// pool, cleared whenever the graph runs. null where the stream is not known: a kernel must do without.
constexpr int32_t kCounters = 2048;
int32_t* counters_of(const Tensor& like, const Device& device);

}  // namespace tf::cuda
#endif
