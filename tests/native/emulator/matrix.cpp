// ldmatrix and mma.sync, by the fragment layouts that the PTX ISA gives.
#include "async.hpp"
#include "block_async.hpp"
#include "simt.cuh"

namespace tf::emulator {
namespace {

struct Rows {
  uint32_t* registers;
  int matrices;
  bool transposed;
  const unsigned char* row;
};

void execute_ldmatrix(void* const* payloads, unsigned) {
  const auto lane_of = [&](unsigned l) { return static_cast<Rows*>(payloads[l]); };
  const Rows& first = *lane_of(0);
  for (unsigned l = 0; l < kWarp; ++l) {
    if (lane_of(l)->matrices != first.matrices || lane_of(l)->transposed != first.transposed)
      fail("divergent warp instruction: lanes load different kinds of matrices");
  }
  ++counters.ldmatrix;
  for (int m = 0; m < first.matrices; ++m) {
    uint16_t values[8][8];
    int ways[8] = {}, conflict = 0;
    for (unsigned i = 0; i < 8; ++i) {
      const unsigned char* row = lane_of(unsigned(m) * 8 + i)->row;
      const uint32_t offset = check_shared(row, 16, 16, false);
      conflict = std::max(conflict, ++ways[offset / 16 % 8]);
      std::memcpy(values[i], row, 16);
    }
    counters.ldmatrix_conflicts += unsigned(conflict - 1);
    for (unsigned l = 0; l < kWarp; ++l) {
      const unsigned i = l / 4, j = 2 * (l % 4);
      const uint16_t lo = first.transposed ? values[j][i] : values[i][j];
      const uint16_t hi = first.transposed ? values[j + 1][i] : values[i][j + 1];
      lane_of(l)->registers[m] = uint32_t(lo) | uint32_t(hi) << 16;
    }
  }
}

void execute_stmatrix(void* const* payloads, unsigned) {
  const auto lane_of = [&](unsigned l) { return static_cast<Rows*>(payloads[l]); };
  const Rows& first = *lane_of(0);
  for (int m = 0; m < first.matrices; ++m) {
    uint16_t values[8][8];
    for (unsigned l = 0; l < kWarp; ++l) {
      const unsigned i = l / 4, j = 2 * (l % 4);
      const uint32_t r = lane_of(l)->registers[m];
      (first.transposed ? values[j][i] : values[i][j]) = uint16_t(r);
      (first.transposed ? values[j + 1][i] : values[i][j + 1]) = uint16_t(r >> 16);
    }
    for (unsigned i = 0; i < 8; ++i) {
      unsigned char* row = const_cast<unsigned char*>(lane_of(unsigned(m) * 8 + i)->row);
      check_shared(row, 16, 16, true, values[i]);
      std::memcpy(row, values[i], 16);
    }
  }
}

struct Fragments {
  bool half;
  float* d;
  const uint32_t *a, *b;
};

float2 two(bool half, uint32_t r) {
  return half ? tf::cuda::floats_of_pair<tf::cuda::half_t>(r) : tf::cuda::floats_of_pair<tf::cuda::bf16_t>(r);
}

void execute_mma(void* const* payloads, unsigned) {
  ++counters.mma;
  float a[16][16], b[16][8];
  const bool half = static_cast<Fragments*>(payloads[0])->half;
  for (unsigned l = 0; l < kWarp; ++l) {
    const auto& f = *static_cast<Fragments*>(payloads[l]);
    if (f.half != half) fail("divergent warp instruction: lanes multiply different types");
    const unsigned g = l / 4, t = 2 * (l % 4);
    for (unsigned r = 0; r < 4; ++r) {
      const float2 v = two(half, f.a[r]);
      a[g + 8 * (r % 2)][t + 8 * (r / 2)] = v.x;
      a[g + 8 * (r % 2)][t + 8 * (r / 2) + 1] = v.y;
    }
    for (unsigned r = 0; r < 2; ++r) {
      const float2 v = two(half, f.b[r]);
      b[t + 8 * r][g] = v.x;
      b[t + 8 * r + 1][g] = v.y;
    }
  }
  float c[16][8] = {};
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < 8; ++j) c[i][j] += a[i][k] * b[k][j];
    }
  }
  for (unsigned l = 0; l < kWarp; ++l) {
    float* d = static_cast<Fragments*>(payloads[l])->d;
    const unsigned g = l / 4, t = 2 * (l % 4);
    for (unsigned r = 0; r < 4; ++r) d[r] += c[g + 8 * (r / 2)][t + r % 2];
  }
}

}  // namespace

void ldmatrix(uint32_t* registers, int matrices, bool transposed, const void* shared_row) {
  Rows rows{registers, matrices, transposed, static_cast<const unsigned char*>(shared_row)};
  warp_instruction("ldmatrix", ~0u, &rows, execute_ldmatrix);
}

void stmatrix(const uint32_t* registers, int matrices, bool transposed, void* shared_row) {
  Rows rows{const_cast<uint32_t*>(registers), matrices, transposed, static_cast<const unsigned char*>(shared_row)};
  warp_instruction("stmatrix", ~0u, &rows, execute_stmatrix);
}

void mma_m16n8k16(bool half, float* d, const uint32_t* a, const uint32_t* b) {
  Fragments f{half, d, a, b};
  warp_instruction("mma.sync", ~0u, &f, execute_mma);
}

}  // namespace tf::emulator
