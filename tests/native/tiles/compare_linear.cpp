// Compares products of bfloat16 in tiles to double precision, within the rounding of the result to bfloat16. Memory
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
// gap: values between rows. x_across, w_across: one input of all rows, or outputs, lies side by side.
static void compare(int64_t rows, int64_t in, int64_t out, bool biased, int64_t gap, bool x_across = false,
                    bool w_across = false) {
  std::mt19937 rng(1);
  LinearBf16 call{};
  call.x_stride = x_across ? 1 : in + gap, call.x_in_stride = x_across ? rows + gap : 1;
  call.out_stride = w_across ? 1 : in + gap, call.in_stride = w_across ? out + gap : 1;
  // The last value ends where the memory does.
  const int64_t x_size = (rows - 1) * call.x_stride + (in - 1) * call.x_in_stride + 1;
  const int64_t weight_size = (out - 1) * call.out_stride + (in - 1) * call.in_stride + 1;
  const Rows x = random_rows(rng, x_size), weight = random_rows(rng, weight_size), bias = random_rows(rng, out);
  Rows y(size_t(rows * out), 0x7fff);
  call.x = x.data(), call.weight = weight.data(), call.y = y.data();
  call.bias = biased ? bias.data() : nullptr;
  call.rows = rows, call.in = in, call.out = out;
  linear_tiles(call);
  ++cases;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < out; ++c) {
      double sum = biased ? value(bias[c]) : 0., size = std::fabs(sum);
      for (int64_t k = 0; k < in; ++k) {
        const double product = value(x[r * call.x_stride + k * call.x_in_stride]) *
                               value(weight[c * call.out_stride + k * call.in_stride]);
        sum += product;
        size += std::fabs(product);
      }
      const double found = value(y[r * out + c]);
      if (std::fabs(found - sum) <= 1.01 * kUnit * std::fabs(sum) + 1e-6 * size) continue;
      ++failures;
      std::printf("%ld rows, %ld inputs, %ld outputs, gap %ld, across %d %d: (%ld, %ld) is %g, not %g\n", long(rows),
                  long(in), long(out), long(gap), x_across, w_across, long(r), long(c), found, sum);
      return;
    }
}

int main() {
  for (int64_t rows : {1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 65}) compare(rows, 64, 128, rows % 2, 0);
  for (int64_t in : {1, 2, 3, 31, 32, 33, 63, 95, 97}) compare(18, in, 64, in % 2, 0);
  for (int64_t out : {1, 2, 15, 16, 17, 63, 64, 65, 130}) compare(33, 32, out, out % 2, 0);
  for (int64_t gap : {1, 7, 32}) compare(35, 66, 70, true, gap);
  for (threads = 2; threads < 5; ++threads) compare(20, 64, 200, true, 0), compare(150, 64, 40, true, 0);
  threads = 1;
  for (int64_t rows : {129, 144, 145, 161, 177}) compare(rows, 40, 70, rows % 2, 3);  // past the kernel for few rows
  for (int64_t in : {1, 2, 31, 33, 1025, 2081}) compare(130, in, 48, in % 2, 1);
  for (int64_t out : {1, 15, 16, 17, 31, 32, 33}) compare(130, 64, out, out % 2, 0);
  for (int64_t rows : {1, 15, 16, 17, 31, 33, 49, 130})
    for (int64_t in : {1, 2, 31, 32, 33, 67}) {
      compare(rows, in, 35, true, 1, true, false);
      compare(rows, in, rows, true, 1, false, true);
      compare(rows, in, 47, true, rows % 3, true, true);
    }
  std::printf("%d cases, %d failures\n", cases, failures);
  return failures != 0;
}
