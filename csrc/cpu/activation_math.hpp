// The activations and their derivatives on vectors.
#pragma once
#include "activation.hpp"
#include "simd.hpp"

namespace tf::TF_ISA {

// Each activation gives y = act(x) and d = act'(x).
struct Relu {
  static inline void compute(Vec x, Vec& y, Vec& d) {
    y = x < 0.f ? broadcast(0.f) : x;  // NaN for NaN
    d = x > 0.f ? broadcast(1.f) : broadcast(0.f);
  }
};

// s = 1 / (1 + exp(u)) and 1 - s, both accurate to the last places.
static inline void sigmoid_of_minus(Vec u, Vec& s, Vec& complement) {
  const Vec e = exp(u);
  s = 1.f / (1.f + e);
  complement = min(e, broadcast(1e30f)) * s;
}

struct Silu {
  static inline void compute(Vec x, Vec& y, Vec& d) {
    Vec s, complement;
    sigmoid_of_minus(-x, s, complement);
    y = x * s;
    d = fma(y, complement, s);
  }
};

struct GeluTanh {
  // 0.5 x (1 + tanh u) = x sigmoid(2u),  u = sqrt(2 / pi) (x + 0.044715 x^3)
  static inline void compute(Vec x, Vec& y, Vec& d) {
    const float two_k = 1.5957691216057308f, cubic = 0.044715f * two_k;
    Vec s, complement;
    sigmoid_of_minus(-x * fma(x * x, broadcast(cubic), broadcast(two_k)), s, complement);
    y = x * s;
    const Vec near = max(broadcast(-16.f), min(broadcast(16.f), x));  // beyond, s (1 - s) is 0: avoids infinity * 0
    const Vec slope = fma(near * near, broadcast(3.f * cubic), broadcast(two_k));
    d = fma(near * slope, s * complement, s);
  }
};

struct Gelu {
  // x Phi(x), Phi the normal distribution: 1/2 + x Q(x^2) for |x| < 1, and for larger |x| from the tail
  // Phi(-a) = exp(-a^2 / 2) h(a), h(a) = t P(t), t = 1 / (1 + 0.35 a). Minimax fits, relative error below 4e-8.
  // The same exponential is the density in the derivative Phi(x) + x phi(x).
  static inline void compute(Vec x, Vec& y, Vec& d) {
    const Vec a = min(abs(x), broadcast(13.f));  // Phi(-13) is 6e-39
    const Vec square = a * a, e = exp_bounded(square * -0.5f);
    const Vec t = reciprocal(fma(a, broadcast(0.35f), broadcast(1.f)));
    Vec p = broadcast(-0.029146134853363037f);
    p = fma(p, t, broadcast(0.14397267997264862f));
    p = fma(p, t, broadcast(-0.2557162642478943f));
    p = fma(p, t, broadcast(0.15917643904685974f));
    p = fma(p, t, broadcast(-0.0231113750487566f));
    p = fma(p, t, broadcast(0.10550864785909653f));
    p = fma(p, t, broadcast(0.11983270943164825f));
    p = fma(p, t, broadcast(0.13986189663410187f));
    p = fma(p, t, broadcast(0.13962140679359436f));
    const Vec tail = p * t * e;
    Vec q = broadcast(-7.654207365703769e-06f);
    q = fma(q, square, broadcast(0.00011348637053743005f));
    q = fma(q, square, broadcast(-0.0011863299878314137f));
    q = fma(q, square, broadcast(0.009973322972655296f));
    q = fma(q, square, broadcast(-0.06649035960435867f));
    q = fma(q, square, broadcast(0.3989422917366028f));
    Vec phi = x < 0.f ? tail : 1.f - tail;
    phi = a < 1.f ? fma(x, q, broadcast(0.5f)) : phi;
    phi = x < -13.f ? broadcast(0.f) : phi;
    y = x * phi;
    const Vec density = abs(x) < 13.f ? e * 0.3989422804f : broadcast(0.f);
    d = fma(x, density, phi);
  }
};

// x Phi(x) with a relative error of 2e-4, 0 below -13; rounding to bfloat16 makes 4e-3. Half of the instructions of
// Gelu: Phi of negative numbers is exp(-a^2 / 2) t P(t), t = 1 / (1 + 0.25 a). Minimax fits.
struct Bf16Gelu {
  static inline void compute(Vec x, Vec& y, Vec&) {
    const Vec a = min(abs(x), broadcast(13.f));  // Phi(-13) is 6e-39
    const Vec power = a * a * -0.72134752f;      // of 2
    const Vec divisor = fma(a, broadcast(0.25f), broadcast(1.f));
#if defined(__AVX512F__)
    const Vec n = bit_cast<Vec>(_mm512_maskz_roundscale_ps(0xffff, bit_cast<__m512>(power), 8));
    const Vec t = bit_cast<Vec>(_mm512_maskz_rcp14_ps(0xffff, bit_cast<__m512>(divisor)));
#else
    const Vec shifted = power + 12582912.f, n = shifted - 12582912.f;  // 1.5 * 2^23: adding rounds to an integer
    const Vec t = 1.f / divisor;
#endif
    const Vec r = power - n;
    Vec e = broadcast(0.00957007613f);
    e = fma(e, r, broadcast(0.0559178914f));
    e = fma(e, r, broadcast(0.240247461f));
    e = fma(e, r, broadcast(0.693121808f));
    e = fma(e, r, broadcast(0.99999926f));
#if defined(__AVX512F__)
    e = bit_cast<Vec>(_mm512_maskz_scalef_ps(0xffff, bit_cast<__m512>(e), bit_cast<__m512>(n)));
#else
    e = bit_cast<Vec>(bit_cast<VecI>(e) + (bit_cast<VecI>(shifted) << 23));  // low bits of `shifted` hold n
#endif
    Vec p = broadcast(0.240693024f);
    p = fma(p, t, broadcast(-0.101692167f));
    p = fma(p, t, broadcast(0.1785233f));
    p = fma(p, t, broadcast(0.0811850028f));
    p = fma(p, t, broadcast(0.101265669f));
    const Vec tail = p * t * e;
    Vec phi = x < 0.f ? tail : 1.f - tail;
    phi = x < -13.f ? broadcast(0.f) : phi;
    y = x * phi;
  }
};

// The activation, without its derivative, for results that are rounded to T.
template <class T, class Act>
struct Rounded {
  typedef Act type;
};
template <>
struct Rounded<bf16, Gelu> {
  typedef Bf16Gelu type;
};

template <class F>
static inline void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::gelu: return f(Gelu{});
    case Activation::gelu_tanh: return f(GeluTanh{});
    case Activation::relu: return f(Relu{});
    case Activation::silu: return f(Silu{});
  }
}

}  // namespace tf::TF_ISA
