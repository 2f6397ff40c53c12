// Counter-based randomness for dropout (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
// SC 2011): Philox4x32 with 7 rounds. Element (bh, i, j) takes 16 of the 128 bits of one counter:
//
//   counter = (16 * (j / 128) + j % 16,  i,  bh,  offset)     key = seed
//   lane    = (j % 128) / 16             bits = word[lane % 4] >> (lane < 4 ? 0 : 16)
//
// so that 16 neighbouring columns are 16 neighbouring counters (vectors on a CPU, a whole mma fragment on a GPU), and
// the mask depends only on the element's indices. An element is kept when bits >= threshold.
#pragma once
#include "simd.hpp"

namespace tf::TF_ISA {

struct PhiloxWords {
  VecU w[4];
};

// Philox for kWidth counters, one per lane.
static inline PhiloxWords philox(VecU c0, VecU c1, VecU c2, VecU c3, uint64_t seed) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 7; ++round) {
    VecU hi0, lo0, hi1, lo1;
    multiply_wide(c0, 0xD2511F53u, hi0, lo0);
    multiply_wide(c2, 0xCD9E8D57u, hi1, lo1);
    VecU n0 = hi1 ^ c1 ^ broadcast_u(k0), n2 = hi0 ^ c3 ^ broadcast_u(k1);
    c1 = lo1;
    c3 = lo0;
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Keep factors (0 or keep_scale) of the 128 columns [128 * group, 128 * group + 128) of row i.
static inline void dropout_factors(const Philox& p, uint32_t bh, uint32_t i, uint32_t group, float* factors) {
  const VecU threshold = broadcast_u(p.threshold);
  const Vec scale = broadcast(p.keep_scale), zero = broadcast(0.f);
  for (int c = 0; c < 16; c += kWidth) {
    PhiloxWords r = philox(iota_u(group * 16 + c), broadcast_u(i), broadcast_u(bh), broadcast_u(uint32_t(p.offset)),
                           p.seed);
    for (int lane = 0; lane < 8; ++lane) {
      VecU bits = lane < 4 ? (r.w[lane] & broadcast_u(0xffffu)) : (r.w[lane - 4] >> 16);
      store(factors + lane * 16 + c, select_u_ge(bits, threshold, scale, zero));
    }
  }
}

}  // namespace tf::TF_ISA
