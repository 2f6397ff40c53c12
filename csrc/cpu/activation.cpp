// y = act(x + bias) [* gate] and its gradients: one read and one write.
#include "activation_math.hpp"
#include "column_sums.hpp"
#include "kernels.hpp"

namespace tf::TF_ISA {
namespace {

template <class T>
const T* row_of(const void* p, int64_t r, int64_t stride) {
  return static_cast<const T*>(p) + r * stride;
}

template <class T, class Act>
void forward_rows(const BiasActivationForward& a, int64_t begin, int64_t end) {
  const float* bias = a.bias;
  for (int64_t r = begin; r < end; ++r) {
    const T *x = row_of<T>(a.x, r, a.x_stride), *gate = a.gate ? row_of<T>(a.gate, r, a.gate_stride) : nullptr;
    T* out = static_cast<T*>(a.y) + r * a.width;
    for_columns(a.width, [&](int64_t c, auto part) {
      Vec v = load(x + c, part), y, slope;
      if (bias) v = v + load(bias + c, part);
      Rounded<T, Act>::type::compute(v, y, slope);
      if (gate) y = y * load(gate + c, part);
      store(out + c, y, part);
    });
  }
}

template <class T, class Act>
void backward_rows(const BiasActivationBackward& a, int64_t begin, int64_t end, float* grad_bias) {
  const float* bias = a.bias;
  for (int64_t r = begin; r < end; ++r) {
    const T *g = row_of<T>(a.grad, r, a.grad_stride), *x = row_of<T>(a.x, r, a.x_stride);
    const T* gate = a.gate ? row_of<T>(a.gate, r, a.gate_stride) : nullptr;
    T* dx = static_cast<T*>(a.grad_x) + r * a.width;
    T* dgate = gate ? static_cast<T*>(a.grad_gate) + r * a.width : nullptr;
    for_columns(a.width, [&](int64_t c, auto part) {
      Vec v = load(x + c, part), dy = load(g + c, part), y, slope;
      if (bias) v = v + load(bias + c, part);
      Act::compute(v, y, slope);
      if (gate) {
        store(dgate + c, dy * y, part);
        dy = dy * load(gate + c, part);
      }
      const Vec d = dy * slope;
      store(dx + c, d, part);
      if (grad_bias) store(grad_bias + c, load(grad_bias + c, part) + d, part);
    });
  }
}

int64_t grain_of(int64_t width) { return 1 + 8192 / (width + 1); }

}  // namespace

void bias_activation_forward(const BiasActivationForward& a) {
  parallel_for(a.rows, grain_of(a.width), [&](int64_t begin, int64_t end) {
    with_dtype(a.dtype, [&](auto element) {
      with_activation(a.activation, [&](auto activation) {
        forward_rows<decltype(element), decltype(activation)>(a, begin, end);
      });
    });
  });
}

void bias_activation_backward(const BiasActivationBackward& a) {
  ColumnSums<1> sums(a.rows, a.width, {a.grad_bias});
  sums.run(grain_of(a.width), [&](int64_t begin, int64_t end, float* const* into) {
    with_dtype(a.dtype, [&](auto element) {
      with_activation(a.activation, [&](auto activation) {
        backward_rows<decltype(element), decltype(activation)>(a, begin, end, into[0]);
      });
    });
  });
}

}  // namespace tf::TF_ISA
