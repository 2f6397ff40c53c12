// y = act(x W^T + b) in bfloat16: in matrix tiles where the processor has them. Elsewhere torch's product is as fast,
// and plain dot products do.
#include "kernels.hpp"
#include "linear_bf16_few.hpp"
#include "linear_bf16_many.hpp"

namespace tf::TF_ISA {
namespace {

#if defined(TF_TILES)

template <class Act>
void multiply(const LinearBf16& l) {
  if (FewRows::fit(l))
    FewRows(l).run<Act>();
  else
    ManyRows::run<Act>(l);
}

#else

template <class Act>
void multiply(const LinearBf16& l) {
  const bf16 *x = static_cast<const bf16*>(l.x), *weight = static_cast<const bf16*>(l.weight);
  parallel_for(l.out, 1 + 4096 / (l.in * l.rows), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const float bias = l.bias ? to_float(static_cast<const bf16*>(l.bias)[c]) : 0.f;
      for (int64_t r = 0; r < l.rows; ++r) {
        float sum = 0.f;
        for (int64_t k = 0; k < l.in; ++k)
          sum += to_float(x[r * l.x_stride + k * l.x_in_stride]) *
                 to_float(weight[c * l.out_stride + k * l.in_stride]);
        from_float(static_cast<bf16*>(l.y)[r * l.out + c], Act::apply(broadcast(sum + bias))[0]);
      }
    }
  });
}

#endif
}  // namespace

void linear_bf16(const LinearBf16& l) {
  if (!l.has_activation)
    multiply<Identity>(l);
  else
    with_activation(l.activation, [&](auto a) { multiply<Activated<decltype(a)>>(l); });
}

}  // namespace tf::TF_ISA
