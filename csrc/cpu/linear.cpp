// The gradient of a bias, which torch's GEMMs do not compute.
#include "linear.hpp"

#include "column_sums.hpp"
#include "kernels.hpp"

namespace tf::TF_ISA {
namespace {

template <class T>
void add_rows(const ColumnSum& a, int64_t begin, int64_t end, float* into) {
  const T* x = static_cast<const T*>(a.x);
  int64_t r = begin;
  for (; r + 4 <= end; r += 4)
    for_columns(a.width, [&](int64_t c, auto part) {
      const T* p = x + r * a.x_stride + c;
      const Vec low = load(p, part) + load(p + a.x_stride, part);
      const Vec high = load(p + 2 * a.x_stride, part) + load(p + 3 * a.x_stride, part);
      store(into + c, load(into + c, part) + (low + high), part);
    });
  for (; r < end; ++r)
    for_columns(a.width, [&](int64_t c, auto part) {
      store(into + c, load(into + c, part) + load(x + r * a.x_stride + c, part), part);
    });
}

}  // namespace

void column_sum(const ColumnSum& a) {
  ColumnSums<1> sums(a.rows, a.width, {a.out});
  sums.run(1 + 65536 / (a.width + 1), [&](int64_t begin, int64_t end, float* const* into) {
    with_dtype(a.dtype, [&](auto element) { add_rows<decltype(element)>(a, begin, end, into[0]); });
  });
}

}  // namespace tf::TF_ISA
