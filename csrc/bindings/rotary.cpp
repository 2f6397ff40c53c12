#include "rotary.hpp"

namespace tf {
namespace {

// The Python op checks these where it can see their values; calls from a compiled graph are only checked here.
// place(b, t): the row of cos and sin without positions.
template <class Call, class Place>
void check_positions(const Call& a, int64_t table_rows, const Place& place) {
  for (int64_t b = 0; b < a.batch; ++b)
    for (int64_t t = 0; t < a.length; ++t) {
      const int64_t row = a.positions ? a.positions[b * a.position_batch + t * a.position_token] : place(b, t);
      STD_TORCH_CHECK(row >= 0 && row < table_rows, a.positions ? "positions" : "cos", ": wanted rows in [0, ",
                      table_rows, "), got ", row);
    }
}

void rotary(Tensor x, Tensor cos, Tensor sin, OptionalTensor positions, bool interleaved, bool inverse, Tensor y) {
  const Rotary a = rotary_of(x, cos, sin, positions, interleaved, inverse, y);
  check_positions(a, cos.size(0), [](int64_t, int64_t t) { return t; });
  kernels().rotary(a);
}

void check_places(const RotaryAppend& a, int64_t table_rows) {
  for (int64_t b = 0; b < a.batch; ++b)
    STD_TORCH_CHECK(0 <= used_of(a, b) && used_of(a, b) <= a.capacity - a.length,
                    "cache_lengths: wanted values in [0, ", a.capacity - a.length, "], got ", used_of(a, b));
  check_positions(a, table_rows, [&](int64_t b, int64_t t) { return used_of(a, b) + t; });
}

void rotary_append(Tensor query, Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, Tensor lengths,
                   Tensor cos, Tensor sin, OptionalTensor positions, OptionalTensor query_weight,
                   OptionalTensor key_weight, double eps, bool interleaved, Tensor y) {
  const RotaryAppend a = rotary_append_of(query, key, value, key_cache, value_cache, lengths, cos, sin, positions,
                                          query_weight, key_weight, eps, interleaved, y, ScalarType::Float);
  check_places(a, cos.size(0));
  kernels().rotary_append(a);
}

}  // namespace
}  // namespace tf

STABLE_TORCH_LIBRARY_IMPL(transformer_fast, CPU, m) {
  m.impl("cpu_rotary", TORCH_BOX(&tf::rotary));
  m.impl("cpu_rotary_append", TORCH_BOX(&tf::rotary_append));
}
