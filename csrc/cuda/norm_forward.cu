// layer_norm, rms_norm and their residual + dropout fusions, forward: one pass over memory, the row stays in registers.
#include "norm_row.cuh"

namespace tf::cuda {
namespace {

// One row, as vectors of T, and its results.
template <class T, int kWidth>
struct ForwardRow {
  using P = Vector<T, kWidth>;
  const NormForward& p;
  const PhiloxKey key;
  const int64_t row;
  const bool exists;

  TF_DEVICE bool inside(int column) const { return exists && column < p.width; }

  TF_DEVICE P x(int column) const {
    return read_vector<T, kWidth>(static_cast<const T*>(p.x) + row * p.x_stride, column, inside(column));
  }
  TF_DEVICE P residual(int column) const {
    return read_vector<T, kWidth>(static_cast<const T*>(p.residual) + row * p.residual_stride, column, inside(column));
  }
  // residual + dropout(x), rounded to T: the sum that is returned is the one normalised. Whole warps call it.
  TF_DEVICE void combine(P& x, const P& residual, int column) const {
    float v[kWidth], r[kWidth];
    x.get(v);
    if (p.dropout.threshold) drop_row(p.dropout, key, row, column, v);
    if (p.residual) {
      residual.get(r);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) v[i] += r[i];
    }
    x.set(v);
  }
  TF_DEVICE P v(int column) const {
    P vector = x(column), other;
    if (p.residual) other = residual(column);
    if (p.residual || p.dropout.threshold) combine(vector, other, column);
    return vector;
  }
  TF_DEVICE void write_sum(const P& v, int column) const {
    if (p.sum && inside(column)) v.write(static_cast<T*>(p.sum) + row * p.width + column);
  }
  TF_DEVICE void write_y(const P& v, int column, float mean, float rstd) const {
    if (!inside(column)) return;
    float y[kWidth], w[kWidth];
    v.get(y);
#pragma unroll
    for (float& f : y) f = (f - mean) * rstd;
    if (p.weight.data) {
      read_parameter<T>(p.weight, column, w);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) y[i] *= w[i];
    }
    if (p.bias.data) {
      read_parameter<T>(p.bias, column, w);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) y[i] += w[i];
    }
    P out;
    out.set(y);
    out.write(static_cast<T*>(p.y) + row * p.width + column);
  }
  TF_DEVICE float sum(const P& v, int column) const {
    float f[kWidth], total = 0.f;
    v.get(f);  // zeros past the row
#pragma unroll
    for (float x : f) total += x;
    return total;
  }
  TF_DEVICE float squares(const P& v, int column, float mean) const {
    float f[kWidth], total = 0.f;
    if (column >= p.width) return 0.f;
    v.get(f);
#pragma unroll
    for (float x : f) total += (x - mean) * (x - mean);
    return total;
  }
  TF_DEVICE void write_statistics(float mean, float rstd) const {
    if (!exists || threadIdx.x) return;
    if (p.mean) store(p.mean + row, mean);
    if (p.rstd) store(p.rstd + row, rstd);
  }
};

template <class T, int kWidth>
TF_DEVICE ForwardRow<T, kWidth> forward_row(const NormForward& p) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  return {p, p.dropout.threshold ? philox_key(p.dropout.rng) : PhiloxKey{}, row, row < p.rows};
}

// kVectors vectors of a row per thread; blockDim.x * kVectors vectors cover the row.
template <class T, int kVectors>
__global__ void __launch_bounds__(kNormThreads) norm_forward_kernel(const NormForward p) {
  constexpr int kWidth = 16 / sizeof(T);
  TF_SHARED(shared);
  float* scratch = reinterpret_cast<float*>(shared);
  const auto row = forward_row<T, kWidth>(p);
  const int first = threadIdx.x * kWidth, step = blockDim.x * kWidth;
  Vector<T, kWidth> v[kVectors], residual[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) v[i] = row.x(first + i * step);
  if (p.residual) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) residual[i] = row.residual(first + i * step);
  }
  if (p.residual || p.dropout.threshold) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      row.combine(v[i], residual[i], first + i * step);
      row.write_sum(v[i], first + i * step);
    }
  }
  float mean = 0.f;
  if (!p.rms) {
    float total[1] = {};
#pragma unroll
    for (int i = 0; i < kVectors; ++i) total[0] += row.sum(v[i], first + i * step);
    row_sum<false>(total, scratch, 0);
    mean = total[0] * p.inverse;
  }
  float squares[1] = {};
#pragma unroll
  for (int i = 0; i < kVectors; ++i) squares[0] += row.squares(v[i], first + i * step, mean);
  row_sum<false>(squares, scratch, 1);
  const float rstd = 1.f / sqrtf(squares[0] * p.inverse + p.eps);
  row.write_statistics(mean, rstd);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) row.write_y(v[i], first + i * step, mean, rstd);
}

// Rows too wide for registers, or not aligned (kWidth 1): each is read once per statistic and once for y, all but the
// first time from the caches. All lanes of a warp run every iteration: they compute the dropout mask together.
template <class T, int kWidth>
__global__ void __launch_bounds__(kNormThreads) norm_forward_wide_kernel(const NormForward p) {
  TF_SHARED(shared);
  float* scratch = reinterpret_cast<float*>(shared);
  const auto row = forward_row<T, kWidth>(p);
  const int step = blockDim.x * kWidth, first = threadIdx.x * kWidth;
  float mean = 0.f, total[1] = {}, squares[1] = {};
  for (int column = first; column - first < p.width; column += step) {
    const auto v = row.v(column);
    row.write_sum(v, column);
    total[0] += row.sum(v, column);
  }
  if (!p.rms) {
    row_sum<false>(total, scratch, 0);
    mean = total[0] * p.inverse;
  }
  for (int column = first; column - first < p.width; column += step) {
    squares[0] += row.squares(row.v(column), column, mean);
  }
  row_sum<false>(squares, scratch, 1);
  const float rstd = 1.f / sqrtf(squares[0] * p.inverse + p.eps);
  row.write_statistics(mean, rstd);
  for (int column = first; column - first < p.width; column += step) row.write_y(row.v(column), column, mean, rstd);
}

bool in_vectors(const NormForward& p, int width) {
  return p.width % width == 0 && p.x_stride % width == 0 && p.residual_stride % width == 0 && aligned(p.x) &&
         aligned(p.residual) && aligned(p.weight.data) && aligned(p.bias.data) && aligned(p.y) && aligned(p.sum);
}

template <class T>
void launch(const NormForward& p, Stream stream) {
  constexpr int kWidth = 16 / sizeof(T);
  const bool vectors = in_vectors(p, kWidth), dropout = p.dropout.threshold;
  const int columns = vectors ? p.width / kWidth : p.width;
  const bool wide = !vectors || columns > 4 * kNormThreads;
  // One vector per thread up to a warp; then up to four, so that rows of 1024 16-bit elements need no barrier.
  const int most = columns <= 32 ? 1 : columns <= 64 ? 2 : 4;
  const int threads = std::min(kNormThreads, row_threads(columns, wide ? 4 : most, wide || dropout));
  const int rows = threads > 32 ? 1 : 128 / threads;
  const dim3 grid(unsigned((p.rows + rows - 1) / rows)), block(threads, rows);
  const int bytes = row_sum_bytes(1);
  if (!vectors) {
    TF_LAUNCH((norm_forward_wide_kernel<T, 1>), grid, block, bytes, stream, p);
  } else if (wide) {
    TF_LAUNCH((norm_forward_wide_kernel<T, kWidth>), grid, block, bytes, stream, p);
  } else if (most == 1) {
    TF_LAUNCH((norm_forward_kernel<T, 1>), grid, block, bytes, stream, p);
  } else if (most == 2) {
    TF_LAUNCH((norm_forward_kernel<T, 2>), grid, block, bytes, stream, p);
  } else {
    TF_LAUNCH((norm_forward_kernel<T, 4>), grid, block, bytes, stream, p);
  }
}

}  // namespace

void norm_forward(const NormForward& p, Stream stream) {
  if (!p.rows || !p.width) return;
  switch (p.dtype) {
    case DType::f32: return launch<float>(p, stream);
    case DType::bf16: return launch<bf16_t>(p, stream);
    case DType::f16: return launch<half_t>(p, stream);
  }
}

}  // namespace tf::cuda
