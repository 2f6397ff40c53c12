// Compares the product of few rows in tiles to double precision, within the rounding of the result to bfloat16. Memory
// is allocated to the byte and scratch is NaN before: AddressSanitizer and the comparison find what is read or written
// beside its place.
#include <cstdio>
#include <vector>

#include "bfloat16.hpp"
#include "cpu/linear.hpp"
#include "runtime.hpp"

using namespace tf;
void linear_tiles(const LinearBf16&);

static int failures = 0, cases = 0;
static void compare(int64_t rows, int64_t in, int64_t out, bool biased, int64_t gap) {
  std::mt19937 rng(1);
  // The last row ends where the memory does.
  const int64_t stride = in + gap, x_size = (rows - 1) * stride + in, weight_size = (out - 1) * stride + in;
  const Rows x = random_rows(rng, x_size), weight = random_rows(rng, weight_size), bias = random_rows(rng, out);
  Rows y(size_t(rows * out), 0x7fff);
  LinearBf16 call{};
  call.x = x.data(), call.weight = weight.data(), call.y = y.data();
  call.bias = biased ? bias.data() : nullptr;
  call.rows = rows, call.in = in, call.out = out;
  call.x_stride = call.out_stride = stride;
  linear_tiles(call);
  ++cases;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < out; ++c) {
      double sum = biased ? value(bias[c]) : 0., size = std::fabs(sum);
      for (int64_t k = 0; k < in; ++k) {
        const double product = value(x[r * stride + k]) * value(weight[c * stride + k]);
        sum += product;
        size += std::fabs(product);
      }
      const double found = value(y[r * out + c]);
      if (std::fabs(found - sum) <= 1.01 * kUnit * std::fabs(sum) + 1e-6 * size) continue;
      ++failures;
      std::printf("%ld rows, %ld inputs, %ld outputs, gap %ld: (%ld, %ld) is %g, not %g\n", long(rows), long(in),
                  long(out), long(gap), long(r), long(c), found, sum);
      return;
    }
}

int main() {
  for (int64_t rows : {1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 65}) compare(rows, 64, 128, rows % 2, 0);
  for (int64_t in : {1, 2, 3, 31, 32, 33, 63, 95, 97}) compare(18, in, 64, in % 2, 0);
  for (int64_t out : {1, 2, 15, 16, 17, 63, 64, 65, 130}) compare(33, 32, out, out % 2, 0);
  for (int64_t gap : {1, 7, 32}) compare(35, 66, 70, true, gap);
  for (threads = 2; threads < 5; ++threads) compare(20, 64, 200, true, 0);
  std::printf("%d cases, %d failures\n", cases, failures);
  return failures != 0;
}
