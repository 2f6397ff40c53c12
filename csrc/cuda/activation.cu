// y = act(x + bias) [* gate] and its gradients: one read and one write, a vector of each tensor per thread.
//
// Blocks of the backward pass walk over rows and keep their share of the bias gradient in registers; a second kernel
// adds the shares up in a fixed order: no atomics, bitwise reproducible.
#include "activation.hpp"

#include "column_sum.cuh"
#include "norm_row.cuh"

namespace tf::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPrograms = 8;  // blocks per multiprocessor in the backward pass

struct Gelu {
  static TF_DEVICE void compute(float u, float& y, float& slope) {
    const float open = 0.5f * (1.f + erff(0.7071067811865476f * u));
    y = u * open;
    slope = open + 0.3989422804014327f * u * expf(-0.5f * u * u);
  }
};
struct GeluTanh {  // (1 + tanh z) / 2 = sigmoid(2 z), z = sqrt(2 / pi) (u + 0.044715 u^3)
  static TF_DEVICE void compute(float u, float& y, float& slope) {
    const float open = 1.f / (1.f + expf(-1.5957691216057308f * u * (1.f + 0.044715f * u * u)));
    y = u * open;
    const float near = fminf(fmaxf(u, -16.f), 16.f);  // beyond, open (1 - open) is 0: avoids 0 * infinity
    slope = open + near * open * (1.f - open) * 1.5957691216057308f * (1.f + 0.134145f * near * near);
  }
};
struct Relu {
  static TF_DEVICE void compute(float u, float& y, float& slope) {
    y = u < 0.f ? 0.f : u;
    slope = u <= 0.f ? 0.f : 1.f;
  }
};
struct Silu {
  static TF_DEVICE void compute(float u, float& y, float& slope) {
    const float open = 1.f / (1.f + expf(-u));
    y = u * open;
    slope = open + y * (1.f - open);
  }
};

// kWidth values and slopes of act(u).
template <int kWidth>
TF_DEVICE void activate(Activation activation, const float (&u)[kWidth], float (&y)[kWidth], float (&slope)[kWidth]) {
  const auto with = [&](auto act) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) act.compute(u[i], y[i], slope[i]);
  };
  switch (activation) {
    case Activation::gelu: return with(Gelu{});
    case Activation::gelu_tanh: return with(GeluTanh{});
    case Activation::relu: return with(Relu{});
    case Activation::silu: return with(Silu{});
  }
}

template <class T, int kWidth>
TF_DEVICE void read_row(const void* data, int64_t row, int64_t stride, int column, float (&f)[kWidth]) {
  Vector<T, kWidth> vector;
  vector.read(static_cast<const T*>(data) + row * stride + column);
  vector.get(f);
}
template <class T, int kWidth>
TF_DEVICE void write_row(void* data, int64_t row, int64_t width, int column, const float (&f)[kWidth]) {
  Vector<T, kWidth> vector;
  vector.set(f);
  vector.write(static_cast<T*>(data) + row * width + column);
}

// A grid is blocks of rows times `blocks` of columns, all in axis 0: the other axes end at 65535.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) bias_activation_forward_kernel(const BiasActivationForward p, int blocks) {
  const int column = (int(blockIdx.x % blocks) * int(blockDim.x) + int(threadIdx.x)) * kWidth;
  const int64_t row = int64_t(blockIdx.x / blocks) * blockDim.y + threadIdx.y;
  if (column >= p.width || row >= p.rows) return;
  float u[kWidth], gate[kWidth], bias[kWidth], y[kWidth], slope[kWidth];
  read_row<T>(p.x, row, p.x_stride, column, u);
  if (p.gate) read_row<T>(p.gate, row, p.gate_stride, column, gate);
  if (p.bias.data) {
    read_parameter<T>(p.bias, column, bias);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) u[i] += bias[i];
  }
  activate(p.activation, u, y, slope);
  if (p.gate) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) y[i] *= gate[i];
  }
  write_row<T>(p.y, row, p.width, column, y);
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    bias_activation_backward_kernel(const BiasActivationBackward p, int blocks) {
  TF_SHARED(shared);
  const int column = (int(blockIdx.x % blocks) * int(blockDim.x) + int(threadIdx.x)) * kWidth;
  const int64_t program = blockIdx.x / blocks, step = int64_t(gridDim.x / blocks) * blockDim.y;
  const bool inside = column < p.width;
  float bias[kWidth] = {}, total[kWidth] = {};
  if (inside && p.bias.data) read_parameter<T>(p.bias, column, bias);
  for (int64_t row = program * blockDim.y + threadIdx.y; inside && row < p.rows; row += step) {
    float u[kWidth], grad[kWidth], gate[kWidth], y[kWidth], slope[kWidth];
    read_row<T>(p.x, row, p.x_stride, column, u);
    read_row<T>(p.grad, row, p.grad_stride, column, grad);
    if (p.gate) read_row<T>(p.gate, row, p.gate_stride, column, gate);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) u[i] += bias[i];
    activate(p.activation, u, y, slope);
    if (p.gate) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        y[i] *= grad[i];
        grad[i] *= gate[i];
      }
      write_row<T>(p.grad_gate, row, p.width, column, y);
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      grad[i] *= slope[i];
      total[i] += grad[i];
    }
    write_row<T>(p.grad_x, row, p.width, column, grad);
  }
  if (!p.partial) return;
  const int of_row = int(blockDim.x) * kWidth;
  float* sums = reinterpret_cast<float*>(shared) + threadIdx.x * kWidth;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) store_shared(sums + int(threadIdx.y) * of_row + i, total[i]);
  __syncthreads();
  if (threadIdx.y || !inside) return;
  for (int y = 1; y < int(blockDim.y); ++y) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) total[i] += load_shared(sums + y * of_row + i);
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) store(p.partial + program * p.width + column + i, total[i]);
}

__global__ void __launch_bounds__(kSumColumns* kSumRows)
    activation_bias_kernel(const BiasActivationBackward p, int programs) {
  TF_SHARED(shared);
  column_sum(p.partial, programs, p.width, p.grad_bias, shared);
}

struct Plan {
  bool vectors;  // 16 bytes at a time
  dim3 block;
  int blocks;    // of columns
  int64_t rows;  // blocks of rows
};

template <class P>
Plan plan_of(const P& p, bool aligned_rows) {
  const int width = p.dtype == DType::f32 ? 4 : 8;
  Plan plan;
  plan.vectors = aligned_rows && p.width % width == 0 && p.x_stride % width == 0 && p.gate_stride % width == 0 &&
                 aligned(p.x) && aligned(p.gate) && aligned(p.bias.data);
  const int columns = plan.vectors ? p.width / width : p.width;
  int threads = 1;
  while (threads < columns && threads < kThreads) threads *= 2;
  plan.block = dim3(threads, kThreads / threads);
  plan.blocks = (columns + threads - 1) / threads;
  plan.rows = (p.rows + plan.block.y - 1) / plan.block.y;
  return plan;
}

Plan plan_of(const BiasActivationBackward& p) {
  const int width = p.dtype == DType::f32 ? 4 : 8;
  Plan plan = plan_of(p, p.grad_stride % width == 0 && aligned(p.grad) && aligned(p.grad_x) && aligned(p.grad_gate));
  const int64_t walking = (int64_t(kPrograms) * multiprocessors() + plan.blocks - 1) / plan.blocks;
  if (p.grad_bias) plan.rows = std::min(plan.rows, walking);
  return plan;
}

template <class T>
void launch(const BiasActivationForward& p, Stream stream) {
  constexpr int kWidth = 16 / sizeof(T);
  const Plan plan = plan_of(p, aligned(p.y));
  const dim3 grid(unsigned(plan.rows * plan.blocks));
  if (plan.vectors) {
    TF_LAUNCH((bias_activation_forward_kernel<T, kWidth>), grid, plan.block, 0, stream, p, plan.blocks);
  } else {
    TF_LAUNCH((bias_activation_forward_kernel<T, 1>), grid, plan.block, 0, stream, p, plan.blocks);
  }
}

template <class T>
void launch(const BiasActivationBackward& p, Stream stream) {
  constexpr int kWidth = 16 / sizeof(T);
  const Plan plan = plan_of(p);
  const dim3 grid(unsigned(plan.rows * plan.blocks));
  const int bytes = p.partial ? kThreads * (plan.vectors ? kWidth : 1) * int(sizeof(float)) : 0;
  if (plan.vectors) {
    TF_LAUNCH((bias_activation_backward_kernel<T, kWidth>), grid, plan.block, bytes, stream, p, plan.blocks);
  } else {
    TF_LAUNCH((bias_activation_backward_kernel<T, 1>), grid, plan.block, bytes, stream, p, plan.blocks);
  }
  if (!p.partial) return;
  TF_LAUNCH(activation_bias_kernel, column_sum_grid(p.width, 1), column_sum_block(), kSumBytes, stream, p,
            int(plan.rows));
}

template <class P>
void launch_dtype(const P& p, Stream stream) {
  switch (p.dtype) {
    case DType::f32: return launch<float>(p, stream);
    case DType::bf16: return launch<bf16_t>(p, stream);
    case DType::f16: return launch<half_t>(p, stream);
  }
}

}  // namespace

void bias_activation_forward(const BiasActivationForward& p, Stream stream) { launch_dtype(p, stream); }
int64_t bias_activation_programs(const BiasActivationBackward& p) { return plan_of(p).rows; }
void bias_activation_backward(const BiasActivationBackward& p, Stream stream) { launch_dtype(p, stream); }

}  // namespace tf::cuda
