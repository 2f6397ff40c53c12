// Counter-based dropout: the mask of csrc/cpu/philox.hpp, bit for bit.
#pragma once
#include "ptx.cuh"
#include "simt.cuh"

namespace tf::cuda {

struct PhiloxKey {
  uint64_t seed;
  uint32_t offset;
};

TF_DEVICE PhiloxKey philox_key(const int64_t* rng) {
  return {uint64_t(load(rng)), uint32_t(load(rng + 1))};
}

struct PhiloxWords {
  uint32_t w[4];
};

// Philox4x32 with 7 rounds.
TF_DEVICE PhiloxWords philox(uint32_t c0, uint32_t c1, uint32_t c2, PhiloxKey key) {
  uint32_t c3 = key.offset, k0 = uint32_t(key.seed), k1 = uint32_t(key.seed >> 32);
#pragma unroll
  for (int round = 0; round < 7; ++round) {
    const uint64_t a = uint64_t(c0) * 0xD2511F53u, b = uint64_t(c2) * 0xCD9E8D57u;
    c0 = uint32_t(b >> 32) ^ c1 ^ k0;
    c2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c1 = uint32_t(b);
    c3 = uint32_t(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

TF_DEVICE bool kept(const PhiloxWords& r, int lane, uint32_t threshold) {
  const uint32_t word = r.w[lane % 4];
  return (lane < 4 ? word & 0xffffu : word >> 16) >= threshold;
}

// Whether dropout keeps the single element (bh, i, j).
TF_DEVICE bool keeps(PhiloxKey key, uint32_t bh, uint32_t i, uint32_t j, uint32_t threshold) {
  const PhiloxWords r = philox(j / 128 * 16 + j % 16, i, bh, key);
  const uint32_t lane = j % 128 / 16;
  const uint32_t low = lane & 2 ? (lane & 1 ? r.w[3] : r.w[2]) : (lane & 1 ? r.w[1] : r.w[0]);
  return (lane < 4 ? low & 0xffffu : low >> 16) >= threshold;
}

// Bit e: whether dropout keeps column j + e of row i. All lanes of a warp call it, with the same i. Lane l has kColumns
// columns from j = first + kColumns * l on; first is a multiple of 32 * kColumns. Every lane computes one counter, and
// the lanes exchange its eight columns by votes.
template <int kColumns>
TF_DEVICE uint32_t warp_keep_bits(PhiloxKey key, uint32_t i, uint32_t j, uint32_t threshold) {
  static_assert(kColumns == 4 || kColumns == 8);
  const uint32_t lane = j / kColumns % 32, group = j / 128, mine = j % 128 / 16;
  const PhiloxWords r = philox(group * 16 + lane % 16, i, 0, key);
  uint32_t votes = 0;
#pragma unroll
  for (int l = 0; l < 8; ++l) {
    const uint32_t all = __ballot_sync(0xffffffffu, kept(r, l, threshold));
    votes = uint32_t(l) == mine ? all : votes;
  }
  const uint32_t first = j % 16 + (kColumns == 8 ? lane & 16 : 0);
  return votes >> first & ((1u << kColumns) - 1);
}

}  // namespace tf::cuda
