// Quantises weights to int8, and converts int8 weights to and from panels.
#include "int8_rows.hpp"
#include "kernels_int8.hpp"
#include "parallel.hpp"

namespace tf::TF_ISA {
namespace {

template <class T>
void quantize_rows(const QuantizeWeight& a, int64_t begin, int64_t end) {
  const int64_t groups = int8_groups(a.in, a.group);
  for (int64_t n = begin; n < end; ++n) {
    const T* w = static_cast<const T*>(a.weight) + n * a.out_stride;
    for (int64_t k = 0, g = 0; k < a.in; k += a.group, ++g) {
      const int64_t stop = k + a.group < a.in ? k + a.group : a.in;
      float largest = 0.f;
      for (int64_t i = k; i < stop; ++i) {
        const float size = __builtin_fabsf(to_float(w[i * a.in_stride]));
        largest = size > largest || size != size ? size : largest;  // a NaN stays NaN
      }
      a.scale[n * groups + g] = largest / 127.f;
      const float inverse = largest > 1e-30f ? 127.f / largest : 0.f;
      for (int64_t i = k; i < stop; ++i) {
        const float v = to_float(w[i * a.in_stride]) * inverse;
        a.q[n * a.in + i] = v == v ? int8_t(__builtin_rintf(v)) : int8_t(0);
      }
    }
  }
}

int64_t grain_of(int64_t in) { return 1 + 65536 / (in * kPanel + 1); }

}  // namespace

void quantize_weight(const QuantizeWeight& a) {
  parallel_for(a.out, 1 + 65536 / (a.in + 1), [&](int64_t begin, int64_t end) {
    with_dtype(a.dtype, [&](auto element) { quantize_rows<decltype(element)>(a, begin, end); });
  });
}

void int8_to_panels(const ToInt8Panels& a) {
  const int64_t groups = int8_groups(a.in, a.group), bytes = int8_panel_bytes(a.in, a.group);
  parallel_for((a.out + kPanel - 1) / kPanel, grain_of(a.in), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      int8_t* to = a.panels + p * bytes;
      for (int64_t k = 0, g = 0; k < a.in; k += a.group, ++g) {
        const int64_t depth = int8_depth(a.in - k < a.group ? a.in - k : a.group);
        float scales[kPanel], sums[kPanel];
        for (int64_t c = 0; c < kPanel; ++c) {
          const int64_t n = p * kPanel + c;
          int32_t total = 0;
          for (int64_t i = 0; i < depth; ++i) {
            const int8_t q = n < a.out && k + i < a.in ? a.weight[n * a.in + k + i] : int8_t(0);
            to[(i / 4 * kPanel + c) * 4 + i % 4] = q;
            total += q;
          }
          scales[c] = n < a.out ? a.scale[n * groups + g] : 0.f;
          sums[c] = float(total);
        }
        to += depth * kPanel;
        __builtin_memcpy(to, scales, sizeof scales);
        __builtin_memcpy(to + sizeof scales, sums, sizeof sums);
        to += 2 * kScaleSlots;
      }
    }
  });
}

void int8_from_panels(const FromInt8Panels& a) {
  const int64_t groups = int8_groups(a.in, a.group), bytes = int8_panel_bytes(a.in, a.group);
  parallel_for((a.out + kPanel - 1) / kPanel, grain_of(a.in), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int8_t* from = a.panels + p * bytes;
      for (int64_t k = 0, g = 0; k < a.in; k += a.group, ++g) {
        const int64_t n = a.in - k < a.group ? a.in - k : a.group, depth = int8_depth(n);
        const int8_t* scales = from + depth * kPanel;
        for (int64_t c = 0; c < kPanel && p * kPanel + c < a.out; ++c) {
          const int64_t row = p * kPanel + c;
          for (int64_t i = 0; i < n; ++i) a.weight[row * a.in + k + i] = from[(i / 4 * kPanel + c) * 4 + i % 4];
          __builtin_memcpy(a.scale + row * groups + g, scales + c * sizeof(float), sizeof(float));
        }
        from = scales + 2 * kScaleSlots;
      }
    }
  });
}

}  // namespace tf::TF_ISA
