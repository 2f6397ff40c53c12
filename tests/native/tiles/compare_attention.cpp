// Compares bfloat16 attention in tiles to double precision. Each bound follows from what is rounded to bfloat16 on the
// way: probabilities, gradients of scores, and the result. Memory is allocated to the byte and scratch is NaN before:
// AddressSanitizer and the comparison find what is read or written beside its place.
#include <cstdio>

#include "bfloat16.hpp"
#include "cpu/attention.hpp"
#include "runtime.hpp"

using namespace tf;
void forward_tiles(const AttentionForward&);
void backward_tiles(const AttentionBackward&);

static int failures = 0, cases = 0;
static void expect(const char* what, int64_t q, int64_t k, int64_t d, const Rows& found,
                   const std::vector<double>& truth, const std::vector<double>& bound) {
  ++cases;
  for (size_t i = 0; i < truth.size(); ++i) {
    if (std::fabs(value(found[i]) - truth[i]) <= bound[i] + 1e-30) continue;
    ++failures;
    std::printf("%s: %ld queries, %ld keys, dim %ld: [%ld] is %g, not %g within %g\n", what, long(q), long(k), long(d),
                long(i), value(found[i]), truth[i], bound[i]);
    return;
  }
}

// One head. left, right: of a window; -1: none.
static void compare(int64_t queries, int64_t keys, int64_t dim, int64_t left, int64_t right) {
  std::mt19937 rng(1);
  const Rows q = random_rows(rng, queries * dim), k = random_rows(rng, keys * dim), v = random_rows(rng, keys * dim);
  const Rows grad = random_rows(rng, queries * dim);
  Rows out(q.size(), 0x7fff), dq(q.size(), 0x7fff), dk(k.size(), 0x7fff), dv(v.size(), 0x7fff);
  std::vector<float> lse(static_cast<size_t>(queries));
  const int64_t start = 0;
  const RowStrides strides{0, 0, dim};
  Attention call{};
  call.dtype = DType::bf16;
  call.batch = call.heads = call.key_heads = 1;
  call.dim = dim;
  call.query = q.data(), call.key = k.data(), call.value = v.data();
  call.query_strides = call.key_strides = call.value_strides = strides;
  call.scale = 1 / std::sqrt(double(dim));
  call.window_left = left, call.window_right = right;
  call.query_starts = call.key_starts = &start;
  call.query_lengths = &queries, call.key_lengths = call.key_rows = &keys;
  AttentionForward forward{};
  static_cast<Attention&>(forward) = call;
  forward.out = out.data(), forward.out_strides = strides, forward.lse = lse.data();
  forward_tiles(forward);
  AttentionBackward backward{};
  static_cast<Attention&>(backward) = call;
  backward.out = out.data(), backward.grad_out = grad.data(), backward.lse = lse.data();
  backward.out_strides = backward.grad_out_strides = strides;
  backward.dq = dq.data(), backward.dk = dk.data(), backward.dv = dv.data();
  backward.dq_strides = backward.dk_strides = backward.dv_strides = strides;
  backward_tiles(backward);

  std::vector<double> y(q.size()), y_bound(q.size()), gq(q.size()), gq_bound(q.size());
  std::vector<double> gk(k.size()), gk_bound(k.size()), gv(k.size()), gv_bound(k.size());
  for (int64_t i = 0; i < queries; ++i) {
    std::vector<double> p(static_cast<size_t>(keys)), dp(p.size()), size(p.size());
    double top = -INFINITY, total = 0, delta = 0, delta_size = 0, out_size = 0;
    for (int64_t j = 0; j < keys; ++j) {
      double dot = 0;
      for (int64_t c = 0; c < dim; ++c) {
        dot += value(q[i * dim + c]) * value(k[j * dim + c]);
        dp[j] += value(grad[i * dim + c]) * value(v[j * dim + c]);
        size[j] += std::fabs(value(grad[i * dim + c]) * value(v[j * dim + c]));
      }
      const bool seen = (left < 0 || j >= i - left) && (right < 0 || j <= i + right);
      p[j] = seen ? dot * call.scale : -INFINITY;
      top = std::fmax(top, p[j]);
    }
    if (top == -INFINITY) continue;  // nothing to attend to: zeros
    for (double& x : p) x = std::exp(x - top), total += x;
    for (int64_t j = 0; j < keys; ++j) {
      p[j] /= total;
      delta += p[j] * dp[j];
      delta_size += p[j] * size[j];
    }
    for (int64_t c = 0; c < dim; ++c) {
      double sum = 0, sizes = 0;
      for (int64_t j = 0; j < keys; ++j) {
        sum += p[j] * value(v[j * dim + c]);
        sizes += p[j] * std::fabs(value(v[j * dim + c]));
      }
      y[i * dim + c] = sum;
      y_bound[i * dim + c] = 2.2 * kUnit * sizes;  // of p and of the result
      out_size += std::fabs(sum * value(grad[i * dim + c]));
    }
    for (int64_t j = 0; j < keys; ++j) {
      const double ds = p[j] * (dp[j] - delta);
      // Of ds, of float32 sums, and past a thousand keys of delta, which then comes from the rounded output.
      const double error = 1.1 * kUnit * std::fabs(ds) + 1e-5 * p[j] * (size[j] + delta_size) +
                           (keys > 1024 ? 2 * kUnit * p[j] * out_size : 0.);
      for (int64_t c = 0; c < dim; ++c) {
        const double key = value(k[j * dim + c]) * call.scale, query = value(q[i * dim + c]) * call.scale;
        const double g = value(grad[i * dim + c]);
        gq[i * dim + c] += ds * key, gq_bound[i * dim + c] += error * std::fabs(key);
        gk[j * dim + c] += ds * query, gk_bound[j * dim + c] += error * std::fabs(query);
        gv[j * dim + c] += p[j] * g, gv_bound[j * dim + c] += 1.1 * kUnit * p[j] * std::fabs(g);
      }
    }
  }
  for (size_t i = 0; i < gq.size(); ++i) gq_bound[i] += 1.1 * kUnit * std::fabs(gq[i]);  // of the results
  for (size_t i = 0; i < gk.size(); ++i) {
    gk_bound[i] += 1.1 * kUnit * std::fabs(gk[i]);
    gv_bound[i] += 1.1 * kUnit * std::fabs(gv[i]);
  }
  expect("out", queries, keys, dim, out, y, y_bound);
  expect("dq", queries, keys, dim, dq, gq, gq_bound);
  expect("dk", queries, keys, dim, dk, gk, gk_bound);
  expect("dv", queries, keys, dim, dv, gv, gv_bound);
}

int main() {
  for (int64_t keys : {1, 15, 16, 17, 31, 33, 127, 129}) compare(20, keys, 40, -1, -1);
  for (int64_t queries : {7, 15, 16, 17, 33, 63, 65}) compare(queries, queries, 24, -1, 0);
  for (int64_t dim : {1, 2, 8, 31, 32, 33, 64, 80, 100}) compare(18, 35, dim, -1, -1);
  compare(150, 150, 16, 5, 0);
  compare(40, 200, 33, 20, 30);
  compare(10, 3, 16, 0, 0);  // queries past the last key attend to nothing
  compare(20, 1060, 8, -1, -1);
  std::printf("%d cases, %d failures\n", cases, failures);
  return failures != 0;
}
