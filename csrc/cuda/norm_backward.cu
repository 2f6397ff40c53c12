// layer_norm, rms_norm and their residual + dropout fusions, backward. With g = weight * dy, xhat = (v - mean) * rstd,
//
//   dv = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dsum      dx = dv * dropout factors
//   dweight = sum over rows of dy * xhat                          dbias = sum over rows of dy
//
// A few blocks per multiprocessor walk over the rows, once. Each writes its share of dweight and dbias to `partial`,
// which a second kernel adds up in a fixed order: no atomics, bitwise reproducible.
#include "column_sum.cuh"
#include "norm_row.cuh"

namespace tf::cuda {
namespace {

// A thread's share of a row: kVectors vectors, as they were read. All their loads are in flight together.
template <class T, int kWidth, int kVectors>
struct BackwardVectors {
  Vector<T, kWidth> grad_y[kVectors], v[kVectors];
  float mean, rstd;

  TF_DEVICE void read(const NormBackward& p, int64_t row, int first, int step) {
    const bool exists = row < p.rows;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int column = first + i * step;
      const bool inside = exists && column < p.width;
      grad_y[i] = read_vector<T, kWidth>(static_cast<const T*>(p.grad_y) + row * p.grad_y_stride, column, inside);
      v[i] = read_vector<T, kWidth>(static_cast<const T*>(p.v) + row * p.v_stride, column, inside);
    }
    mean = exists && p.mean ? load(p.mean + row) : 0.f;
    rstd = exists ? load(p.rstd + row) : 0.f;
  }
};

// The weights are read again for every row, from the L1 cache: there are too few registers to keep them.
template <class T, int kWidth>
TF_DEVICE void read_weight(const NormBackward& p, int column, float (&weight)[kWidth]) {
#pragma unroll
  for (float& w : weight) w = 1.f;
  if (p.weight.data && column < p.width) read_parameter<T>(p.weight, column, weight);
}

template <class T, int kWidth>
TF_DEVICE void write_gradients(const NormBackward& p, PhiloxKey key, int64_t row, int column, bool inside,
                               float (&grad)[kWidth]) {
  Vector<T, kWidth> out;
  const int64_t place = row * p.width + column;
  if (inside) {
    out.set(grad);
    out.write(static_cast<T*>(p.grad_v) + place);
  }
  if (!p.grad_x) return;
  drop_row(p.dropout, key, row, column, grad);
  if (inside) {
    out.set(grad);
    out.write(static_cast<T*>(p.grad_x) + place);
  }
}

// Adds up a parameter's gradient over the rows of a block and writes it to `partial`.
template <int kWidth, int kVectors>
TF_DEVICE void write_partial(const NormBackward& p, float* partial, const float (&grad)[kVectors][kWidth],
                             float* scratch) {
  const int step = blockDim.x * kWidth, width = step * kVectors;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    float* to = scratch + threadIdx.y * width + i * step + threadIdx.x * kWidth;
#pragma unroll
    for (int e = 0; e < kWidth; e += 4) {
      store_shared_vec(to + e, Vec<float, 4>{{grad[i][e], grad[i][e + 1], grad[i][e + 2], grad[i][e + 3]}});
    }
  }
  __syncthreads();
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  for (int column = thread; column < p.width; column += threads) {
    float total = 0.f;
    for (int y = 0; y < int(blockDim.y); ++y) total += load_shared(scratch + y * width + column);
    store(partial + int64_t(blockIdx.x) * p.width + column, total);
  }
  __syncthreads();
}

// kVectors vectors of a row per thread. kAhead: the next row is loaded while this one is computed.
template <class T, int kVectors, bool kAhead>
__global__ void __launch_bounds__(kNormThreads) norm_backward_kernel(const NormBackward p) {
  constexpr int kWidth = 16 / sizeof(T);
  TF_SHARED(shared);
  float* scratch = reinterpret_cast<float*>(shared);
  const int first = threadIdx.x * kWidth, step = blockDim.x * kWidth;
  const int64_t rows = int64_t(gridDim.x) * blockDim.y;
  const PhiloxKey key = p.grad_x ? philox_key(p.dropout.rng) : PhiloxKey{};
  float grad_weight[kVectors][kWidth] = {}, grad_bias[kVectors][kWidth] = {};
  int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  BackwardVectors<T, kWidth, kVectors> now, next;
  now.read(p, row, first, step);
  int turn = 0;
  for (int64_t block_row = row - threadIdx.y; block_row < p.rows; block_row += rows, row += rows, turn ^= 1) {
    if constexpr (kAhead) next.read(p, row + rows, first, step);
    float sums[2] = {};
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      float dy[kWidth], xhat[kWidth], weight[kWidth];
      now.grad_y[i].get(dy);
      now.v[i].get(xhat);
      read_weight<T>(p, first + i * step, weight);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {  // past the row dy is 0, so xhat does not matter
        xhat[e] = (xhat[e] - now.mean) * now.rstd;
        const float g = dy[e] * weight[e];
        sums[0] += g * xhat[e];
        sums[1] += g;
        grad_weight[i][e] += dy[e] * xhat[e];
        grad_bias[i][e] += dy[e];
      }
    }
    row_sum<true>(sums, scratch, turn);
    const float along = sums[0] * p.inverse, across = p.mean ? sums[1] * p.inverse : 0.f;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      now.grad_y[i].forget();
      now.v[i].forget();
      float grad[kWidth], xhat[kWidth], beside[kWidth], weight[kWidth];
      now.grad_y[i].get(grad);
      now.v[i].get(xhat);
      read_weight<T>(p, first + i * step, weight);
      read_vector<T, kWidth>(static_cast<const T*>(p.grad_sum) + row * p.grad_sum_stride, first + i * step,
                           p.grad_sum && row < p.rows && first + i * step < p.width)
          .get(beside);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        xhat[e] = (xhat[e] - now.mean) * now.rstd;
        grad[e] = (grad[e] * weight[e] - across - xhat[e] * along) * now.rstd + beside[e];
      }
      const int column = first + i * step;
      write_gradients<T>(p, key, row, column, row < p.rows && column < p.width, grad);
    }
    if constexpr (kAhead) {
      now = next;
    } else {
      now.read(p, row + rows, first, step);
    }
  }
  if (!p.partial) return;
  __syncthreads();  // row_sum has read its scratch
  float* partial = p.partial;
  if (p.grad_weight) {
    write_partial(p, partial, grad_weight, scratch);
    partial += int64_t(gridDim.x) * p.width;
  }
  if (p.grad_bias) write_partial(p, partial, grad_bias, scratch);
}

// Rows too wide for registers, or not aligned (kWidth 1): each is read twice, the second time from the caches. Sums
// over rows are kept in `partial`, one thread per element.
template <class T, int kWidth>
__global__ void __launch_bounds__(kNormThreads, 1) norm_backward_wide_kernel(const NormBackward p) {
  TF_SHARED(shared);
  float* scratch = reinterpret_cast<float*>(shared);
  const int step = blockDim.x * kWidth, first = threadIdx.x * kWidth;
  const PhiloxKey key = p.grad_x ? philox_key(p.dropout.rng) : PhiloxKey{};
  float* grad_weight = p.grad_weight ? p.partial + int64_t(blockIdx.x) * p.width : nullptr;
  const int64_t bias_row = (p.grad_weight ? int64_t(gridDim.x) : 0) + blockIdx.x;
  float* grad_bias = p.grad_bias ? p.partial + bias_row * p.width : nullptr;
  for (int column = first; column < p.width; column += step) {
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      if (grad_weight) store(grad_weight + column + e, 0.f);
      if (grad_bias) store(grad_bias + column + e, 0.f);
    }
  }
  int turn = 0;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x, turn ^= 1) {
    float sums[2] = {};
    BackwardVectors<T, kWidth, 1> now;
    float dy[kWidth], xhat[kWidth], weight[kWidth];
    const auto read = [&](int column) {
      now.read(p, row, column, 0);
      now.grad_y[0].get(dy);
      now.v[0].get(xhat);
#pragma unroll
      for (float& x : xhat) x = (x - now.mean) * now.rstd;
      read_weight<T>(p, column, weight);
    };
    for (int column = first; column < p.width; column += step) {
      read(column);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        sums[0] += dy[e] * weight[e] * xhat[e];
        sums[1] += dy[e] * weight[e];
      }
    }
    row_sum<true>(sums, scratch, turn);
    const float along = sums[0] * p.inverse, across = p.mean ? sums[1] * p.inverse : 0.f;
    for (int base = 0; base < p.width; base += step) {  // whole warps: they compute the dropout mask together
      const int column = base + first;
      const bool inside = column < p.width;
      float grad[kWidth], beside[kWidth];
      read(column);
      read_vector<T, kWidth>(static_cast<const T*>(p.grad_sum) + row * p.grad_sum_stride, column, inside && p.grad_sum)
          .get(beside);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        grad[e] = (dy[e] * weight[e] - across - xhat[e] * along) * now.rstd + beside[e];
        if (grad_weight && inside) store(grad_weight + column + e, load(grad_weight + column + e) + dy[e] * xhat[e]);
        if (grad_bias && inside) store(grad_bias + column + e, load(grad_bias + column + e) + dy[e]);
      }
      write_gradients<T>(p, key, row, column, inside, grad);
    }
  }
}

// Block (columns, gradient): sums the partial results of the blocks of the backward kernel.
__global__ void __launch_bounds__(kSumColumns* kSumRows) norm_parameters_kernel(const NormBackward p, int blocks) {
  TF_SHARED(shared);
  column_sum(p.partial + int64_t(blockIdx.y) * blocks * p.width, blocks, p.width,
             blockIdx.y || !p.grad_weight ? p.grad_bias : p.grad_weight, shared);
}

struct Plan {
  bool vectors, wide;  // vectors: 16 bytes at a time; wide: a row does not fit the registers
  int most;          // vectors per thread
  dim3 block;
  int64_t blocks;
};

int vector_width(const NormBackward& p) { return p.dtype == DType::f32 ? 4 : 8; }

Plan plan_of(const NormBackward& p) {
  const int width = vector_width(p);
  Plan plan;
  plan.vectors = p.width % width == 0 && p.grad_y_stride % width == 0 && p.grad_sum_stride % width == 0 &&
               p.v_stride % width == 0 && aligned(p.grad_y) && aligned(p.grad_sum) && aligned(p.v) &&
               aligned(p.weight.data) && aligned(p.grad_v) && aligned(p.grad_x);
  const int columns = plan.vectors ? p.width / width : p.width, sms = multiprocessors();
  const int most = 16 / width;  // 16 elements per thread
  plan.wide = !plan.vectors || columns > most * kNormThreads;
  if (plan.wide) {
    const int threads = std::min(kNormThreads, row_threads(columns, 1, true));
    plan.block = dim3(threads);
    plan.blocks = std::min<int64_t>(p.rows, sms * (kNormThreads / threads));
    return plan;
  }
  plan.most = columns <= 32 ? 1 : std::min(most, columns <= 2 * kNormThreads ? 2 : 4);
  const int threads = row_threads(columns, plan.most, p.grad_x);
  int rows = kNormThreads / threads;
  if (threads > 32) rows = std::min(rows, 15);
  while (rows > 1 && rows * threads > 32 && (p.rows + rows - 1) / rows < sms) rows = (rows + 1) / 2;
  plan.block = dim3(threads, rows);
  plan.blocks = std::min<int64_t>((p.rows + rows - 1) / rows, sms);
  return plan;
}

template <class T>
void launch(const NormBackward& p, const Plan& plan, Stream stream) {
  constexpr int kWidth = 16 / sizeof(T);
  const dim3 grid(unsigned(plan.blocks));
  const int threads = plan.block.x * plan.block.y;
  const int parts = p.partial ? threads * plan.most * kWidth * int(sizeof(float)) : 0;
  const int bytes = std::max(row_sum_bytes(2), plan.wide ? 0 : parts);
  if (!plan.vectors) {
    TF_LAUNCH((norm_backward_wide_kernel<T, 1>), grid, plan.block, bytes, stream, p);
  } else if (plan.wide) {
    TF_LAUNCH((norm_backward_wide_kernel<T, kWidth>), grid, plan.block, bytes, stream, p);
  } else if (plan.most == 1) {
    TF_LAUNCH((norm_backward_kernel<T, 1, true>), grid, plan.block, bytes, stream, p);
  } else if (plan.most == 2) {
    TF_LAUNCH((norm_backward_kernel<T, 2, true>), grid, plan.block, bytes, stream, p);
  } else if constexpr (kWidth == 4) {
    TF_LAUNCH((norm_backward_kernel<T, 4, false>), grid, plan.block, bytes, stream, p);
  }
  if (!p.partial) return;
  const dim3 grid_of_sums = column_sum_grid(p.width, p.grad_weight && p.grad_bias ? 2 : 1);
  TF_LAUNCH(norm_parameters_kernel, grid_of_sums, column_sum_block(), kSumBytes, stream, p, int(plan.blocks));
}

}  // namespace

int64_t norm_backward_blocks(const NormBackward& p) { return plan_of(p).blocks; }

void norm_backward(const NormBackward& p, Stream stream) {
  const Plan plan = plan_of(p);
  switch (p.dtype) {
    case DType::f32: return launch<float>(p, plan, stream);
    case DType::bf16: return launch<bf16_t>(p, plan, stream);
    case DType::f16: return launch<half_t>(p, plan, stream);
  }
}

}  // namespace tf::cuda
