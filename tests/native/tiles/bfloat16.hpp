// Numbers in bfloat16, for programs that test kernels.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

using Rows = std::vector<uint16_t>;
constexpr double kUnit = 1. / 256;  // of rounding to bfloat16

static double value(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float f;
  std::memcpy(&f, &wide, 4);
  return f;
}
static Rows random_rows(std::mt19937& rng, int64_t n) {
  std::normal_distribution<float> normal;
  Rows rows(static_cast<size_t>(n));
  for (uint16_t& r : rows) {
    const float f = normal(rng);
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    r = uint16_t(bits >> 16);
  }
  return rows;
}
