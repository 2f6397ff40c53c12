// y = dropout(x) with the counter-based mask of philox.hpp: nothing is saved.
#include "activation.hpp"
#include "kernels.hpp"
#include "parallel.hpp"
#include "philox.hpp"

namespace tf::TF_ISA {
namespace {

template <class T>
void forward_rows(const DropoutForward& a, int64_t begin, int64_t end) {
  alignas(64) float factors[128];
  for (int64_t r = begin; r < end; ++r) {
    const T* x = static_cast<const T*>(a.x) + r * a.x_stride;
    T* y = static_cast<T*>(a.y) + r * a.width;
    for_columns(a.width, [&](int64_t c, auto part) {
      if (c % 128 == 0) dropout_factors(a.dropout, 0, uint32_t(r), uint32_t(c / 128), factors);
      store(y + c, load(x + c, part) * load(factors + c % 128), part);
    });
  }
}

}  // namespace

void dropout_forward(const DropoutForward& a) {
  parallel_for(a.rows, 1 + 8192 / (a.width + 1), [&](int64_t begin, int64_t end) {
    with_dtype(a.dtype, [&](auto element) { forward_rows<decltype(element)>(a, begin, end); });
  });
}

}  // namespace tf::TF_ISA
