// Compares the int8 kernels with tiles to those without: every bit is equal. Memory is allocated to the byte, so that
// AddressSanitizer finds what is read or written past an end.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "cpu/linear_int8.hpp"
#include "runtime.hpp"

using namespace tf;
void linear_plain(const LinearInt8&);
void linear_tiles(const LinearInt8&);
void block_plain(const Int8Block&);
void block_tiles(const Int8Block&);
void product_plain(const Int8Weight&, const Int8Rows&, int64_t, int64_t, float*);
void product_tiles(const Int8Weight&, const Int8Rows&, int64_t, int64_t, float*);

static std::mt19937 rng(0);
static std::vector<float> floats(int64_t n, float scale = 1.f) {
  std::normal_distribution<float> normal;
  std::vector<float> v(static_cast<size_t>(n));
  for (float& x : v) x = normal(rng) * scale;
  return v;
}

struct Weight {
  Weight(int64_t out, int64_t in, int64_t group) : bias(floats(out)) {
    const int64_t bytes = int8_panel_bytes(in, group), panels = (out + kPanel - 1) / kPanel;
    memory = static_cast<int8_t*>(std::aligned_alloc(64, size_t(panels * bytes)));
    for (int64_t p = 0; p < panels; ++p) {
      int8_t* to = memory + p * bytes;
      for (int64_t k = 0; k < in; k += group) {
        const int64_t depth = int8_depth(std::min(in - k, group));
        float scales[kPanel], sums[kPanel] = {};
        for (int64_t i = 0; i < depth * kPanel; ++i) {
          to[i] = k + i / (4 * kPanel) * 4 + i % 4 < in ? int8_t(int(rng() % 255) - 127) : int8_t(0);
          sums[i / 4 % kPanel] += to[i];
        }
        for (float& s : scales) s = float(rng() % 100 + 1) * 1e-4f;
        std::memcpy(to + depth * kPanel, scales, sizeof scales);
        std::memcpy(to + depth * kPanel + sizeof scales, sums, sizeof sums);
        to += depth * kPanel + 2 * kScaleSlots;
      }
    }
    weight = {memory, bias.data(), out, in, group};
  }
  ~Weight() { std::free(memory); }
  std::vector<float> bias;
  int8_t* memory;
  Int8Weight weight;
};

static int failures = 0, cases = 0;
static void expect_equal(const std::vector<float>& a, const std::vector<float>& b, const char* what, int64_t rows,
                         int64_t in, int64_t out, int64_t group) {
  ++cases;
  bool finite = true;
  for (float x : b) finite = finite && std::isfinite(x);
  if (finite && !std::memcmp(a.data(), b.data(), a.size() * 4)) return;
  ++failures;
  std::printf("%s: rows %ld, in %ld, out %ld, group %ld: %s\n", what, long(rows), long(in), long(out), long(group),
              finite ? "other bits" : "not finite");
}

static void compare_linear(int64_t rows, int64_t in, int64_t out, int64_t group) {
  const Weight first(out, in, group), second(40, in, group);
  const Int8Weight weights[] = {first.weight, second.weight};
  const std::vector<float> x = floats(rows * in);
  std::vector<float> results[2];
  for (int tiles = 0; tiles < 2; ++tiles) {
    results[tiles].assign(size_t(rows * (out + 40)), NAN);
    const LinearInt8 a{DType::f32, DType::f32, x.data(), results[tiles].data(), rows, in, out + 40, weights, 2,
                       true, Activation::gelu};
    tiles ? linear_tiles(a) : linear_plain(a);
  }
  expect_equal(results[0], results[1], "linear", rows, in, out, group);
}

static void compare_product(int64_t rows, int64_t in, int64_t group) {
  const Weight w(64, in, group);
  const int64_t groups = int8_groups(in, group);
  std::vector<uint8_t> values(static_cast<size_t>(rows * in));
  for (uint8_t& v : values) v = uint8_t(rng());
  std::vector<float> scale(size_t(rows * groups), 0.01f), zero(size_t(rows * groups));
  for (float& z : zero) z = float(rng() % 256);
  const Int8Rows x{values.data(), scale.data(), zero.data(), in, groups};
  std::vector<float> results[2];
  for (int tiles = 0; tiles < 2; ++tiles) {
    results[tiles].assign(size_t(rows * kPanel), NAN);
    (tiles ? product_tiles : product_plain)(w.weight, x, rows, 1, results[tiles].data());
  }
  expect_equal(results[0], results[1], "product", rows, in, 64, group);
}

static void compare_block(int64_t rows, int64_t width, int64_t inner, int64_t group, bool gate, bool post) {
  const Weight output(width, width, group), up(inner, width, group), by(inner, width, group), down(width, inner, group);
  const std::vector<float> context = floats(rows * width), residual = floats(rows * width), scale = floats(width);
  std::vector<float> results[2];
  for (int tiles = 0; tiles < 2; ++tiles) {
    results[tiles].assign(size_t(rows * width), NAN);
    const Int8Norm norm{scale.data(), nullptr, 1e-5f, !post}, none{nullptr, nullptr, -1.f, false};
    const Int8Block a{DType::f32, DType::f32, context.data(), residual.data(), results[tiles].data(), rows, width, width,
                      width, output.weight, up.weight, gate ? by.weight : Int8Weight{}, down.weight,
                      post ? norm : none, norm, gate ? Activation::silu : Activation::gelu};
    tiles ? block_tiles(a) : block_plain(a);
  }
  expect_equal(results[0], results[1], post ? "block" : "block, norm first", rows, width, inner, group);
}

int main() {
  for (int64_t rows : {1, 10, 15, 17, 32, 33, 65})
    for (int64_t group : {32, 64, 128, 256})
      for (int64_t in : {60, 64, 320, 576}) compare_linear(rows, in, rows % 2 ? 33 : 160, group);
  threads = 2;
  compare_linear(300, 320, 160, 128);
  for (int64_t rows : {1, 10, 16, 17, 47})
    for (int64_t group : {64, 128, 256})
      for (int64_t in : {64, 256, 448}) compare_product(rows, in, group);
  for (int64_t group : {64, 256}) {
    compare_block(17, 128, 320, group, false, true);
    compare_block(33, 192, 512, group, true, false);
  }
  compare_block(290, 64, 128, 128, true, true);
  std::printf("%d cases, %d failures\n", cases, failures);
  return failures != 0;
}
