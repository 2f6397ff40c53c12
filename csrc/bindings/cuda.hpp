// What the bindings of CUDA kernels need of torch, without CUDA's headers.
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

#if defined(TF_EMULATE)
#define TF_CUDA_KERNELS 1
#define TF_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(transformer_fast, CPU, m)
// The main library has the schemas; it is loaded before the emulator is.
#define TF_CUDA_SCHEMA(m) \
  [[maybe_unused]] static void schema_of_the_main_library(torch::stable::detail::StableLibrary& m)
#else
#if defined(TF_WITH_CUDA)
#define TF_CUDA_KERNELS 1
#else
#define TF_CUDA_KERNELS 0
#endif
#define TF_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(transformer_fast, CUDA, m)
#define TF_CUDA_SCHEMA(m) STABLE_TORCH_LIBRARY_FRAGMENT(transformer_fast, m)
#endif

#if TF_CUDA_KERNELS
#include <cstring>
#include <initializer_list>
#ifndef TF_EMULATE
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace tf::cuda {

// While it lives, the tensor's device is torch's current one.
#ifdef TF_EMULATE
class Device {
 public:
  explicit Device(const Tensor&) {}
  Device(const Device&) = delete;
  ~Device() { forget_tensors(); }
  void* stream() const { return nullptr; }
};
#else
class Device {
 public:
  explicit Device(const Tensor& t) : index_(t.get_device_index()), guard_(index_) {}
  // torch's current stream on the device. By name at run time, so that this library loads where torch has no CUDA.
  void* stream() const {
    using Get = int32_t (*)(int32_t, void**);
    static const Get get = reinterpret_cast<Get>(dlsym(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
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

// Memory for a kernel's own use; on the device of `like`. It holds anything, under the emulator NaN.
inline Tensor new_scratch(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  Tensor t = torch::stable::new_empty(like, shape, dtype);
#ifdef TF_EMULATE
  std::memset(t.mutable_data_ptr(), 0xff, size_t(t.numel()) * t.element_size());
#endif
  return t;
}

}  // namespace tf::cuda
#endif
