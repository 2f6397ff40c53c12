// Products in int8 with the operations around them: a thread takes some rows, quantises them, and finishes its products
// while they are in the cache.
#include "activation_math.hpp"
#include "int8_rows.hpp"
#include "kernels_int8.hpp"
#include "parallel.hpp"

namespace tf::TF_ISA {
namespace {

// Rows per item, at most, and rows multiplied at once. Tiles multiply so fast that each byte of a weight, which comes
// from the L3 cache, has to serve more rows.
#if defined(TF_TILES)
constexpr int64_t kBlock = 128, kPart = 64;
#else
constexpr int64_t kBlock = 48, kPart = 48;
#endif
constexpr int64_t kColumns = 4 * kPanel;     // columns finished together
constexpr int64_t kInner = kInt8Group;       // of a block's up and gate: whole groups of down's inputs

// Pieces of one scratch buffer.
struct Pieces {
  char* next;
  static int64_t bytes(int64_t n) { return (n + 63) / 64 * 64; }
  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(next);
    next += bytes(count * int64_t(sizeof(T)));
    return p;
  }
};

int64_t rows_bytes(int64_t rows, int64_t in, int64_t group) {
  return Pieces::bytes(rows * int8_row_stride(in)) + 2 * Pieces::bytes(rows * int8_groups(in, group) * 4);
}
Int8Rows take_rows(Pieces& from, int64_t rows, int64_t in, int64_t group) {
  Int8Rows r;
  r.stride = int8_row_stride(in);
  r.groups = int8_groups(in, group);
  r.values = from.take<uint8_t>(rows * r.stride);
  r.scale = from.take<float>(rows * r.groups);
  r.zero = from.take<float>(rows * r.groups);
  return r;
}

// Rows in blocks of kBlock, the same number for each thread; then the remaining rows in equal parts, in fours: fewer
// rows than that take as long.
struct RowBlocks {
  RowBlocks(int64_t rows, int64_t threads) : rows(rows), whole(rows / (kBlock * threads) * threads) {
    const int64_t left = rows - whole * kBlock, part = (left + threads - 1) / threads;
    each = (part + 3) / 4 * 4;
    if (each > kBlock) each = kBlock;
    count = whole + (left ? (left + each - 1) / each : 0);
  }
  int64_t begin(int64_t i) const {
    const int64_t at = i <= whole ? i * kBlock : whole * kBlock + (i - whole) * each;
    return at < rows ? at : rows;
  }
  int64_t rows, whole, each, count;
};

template <class F>
void with_optional_activation(bool has, Activation activation, const F& f) {
  if (!has) return f([](Vec v) { return v; });
  with_activation(activation, [&](auto kind) {
    f([](Vec v) {
      Vec y, slope;
      decltype(kind)::compute(v, y, slope);
      return y;
    });
  });
}

// gelu within 4e-5 (5e-5 |x| beyond 4), for results that are rounded to 8 bits at once: 0.5 + x P(x^2) approximates the
// normal distribution.
struct CoarseGelu {
  static inline void compute(Vec x, Vec& y, Vec&) {
    const Vec near = max(broadcast(-4.f), min(broadcast(4.f), x));
    const Vec s = fma(near * near, broadcast(0.125f), broadcast(-1.f));
    Vec p = broadcast(-0.00272963941f);
    p = fma(p, s, broadcast(0.00821204111f));
    p = fma(p, s, broadcast(-0.0132595142f));
    p = fma(p, s, broadcast(0.0216210093f));
    p = fma(p, s, broadcast(-0.0364954136f));
    p = fma(p, s, broadcast(0.0560509562f));
    p = fma(p, s, broadcast(-0.0843574777f));
    p = fma(p, s, broadcast(0.175947741f));
    y = x * fma(near, p, broadcast(0.5f));
  }
};

template <class F>
void with_coarse_activation(Activation activation, const F& f) {
  activation == Activation::gelu ? f(CoarseGelu{}) : with_activation(activation, f);
}

// f(column, columns, row, rows, sums (rows, Columns)) for columns [begin, end) of x W^T and at most kPart rows at a
// time; begin is a multiple of Columns.
template <int64_t Columns = kColumns, class F>
void for_products(const Int8Weight& w, const Int8Rows& x, int64_t rows, int64_t begin, int64_t end, float* sums,
                  const F& f) {
  for (int64_t c = begin; c < end; c += Columns) {
    const int64_t n = end - c < Columns ? end - c : Columns;
    for (int64_t r = 0; r < rows; r += kPart) {
      const int64_t count = least(rows - r, kPart);
      multiply_int8(w, from_row(x, r), count, c / kPanel, (n + kPanel - 1) / kPanel, sums, Columns);
      f(c, n, r, count, static_cast<const float*>(sums));
    }
  }
}

template <class Y>
void linear_columns(const LinearInt8& a, const Int8Weight& w, const Int8Rows& x, int64_t row, int64_t rows,
                    int64_t begin, int64_t end, int64_t at, float* sums) {
  for_products(w, x, rows, begin, end, sums, [&](int64_t c, int64_t n, int64_t r, int64_t count, const float* from) {
    with_optional_activation(a.has_activation, a.activation, [&](auto act) {
      for (int64_t m = r; m < r + count; ++m, from += kColumns) {
        Y* y = static_cast<Y*>(a.y) + (row + m) * a.y_stride + at + c;
        for_columns(n, [&](int64_t i, auto part) {
          Vec v = load(from + i);
          if (w.bias) v = v + load(w.bias + c + i, part);
          store(y + i, act(v), part);
        });
      }
    });
  });
}

// v (n,) -> norm(v), in place.
void norm_row(const Int8Norm& a, float* v, int64_t n) {
  const float inverse = 1.f / float(n);
  float mean = 0.f, variance;
  if (a.rms) {
    variance = inverse * sum(sum_columns(n, [&](int64_t c, auto part) {
                 const Vec x = load(v + c, part);
                 return x * x;
               }));
  } else {
    mean = inverse * sum(sum_columns(n, [&](int64_t c, auto part) { return load(v + c, part); }));
    variance = inverse * sum(sum_columns(n, [&](int64_t c, auto part) {
                 const Vec d = load(v + c, part, mean) - mean;
                 return d * d;
               }));
  }
  const float rstd = 1.f / __builtin_sqrtf(variance + a.eps);
  for_columns(n, [&](int64_t c, auto part) {
    Vec x = (load(v + c, part) - mean) * rstd;
    if (a.weight) x = x * load(a.weight + c, part);
    if (a.bias) x = x + load(a.bias + c, part);
    store(v + c, x, part);
  });
}

template <class T>
class Block {
 public:
  explicit Block(const Int8Block& a) : a_(a) {
    inner_ = round_up_to(a.up.out, kInner);
    Pieces p{static_cast<char*>(tf_scratch(
        0, rows_bytes(kBlock, a.output.in, a.output.group) + rows_bytes(kBlock, a.width, a.up.group) +
               rows_bytes(kBlock, inner_, a.down.group) + (a.gate.panels ? 2 : 1) * Pieces::bytes(kPart * kInner * 4) +
               2 * Pieces::bytes(kBlock * width() * 4)))};
    context_ = take_rows(p, kBlock, a.output.in, a.output.group);
    x_ = take_rows(p, kBlock, a.width, a.up.group);
    activated_ = take_rows(p, kBlock, inner_, a.down.group);
    activated_.groups = int8_groups(a.down.in, a.down.group);
    sums_ = p.take<float>(kPart * kInner);
    gates_ = a.gate.panels ? p.take<float>(kPart * kInner) : nullptr;
    residual_ = p.take<float>(kBlock * width());
    normed_ = p.take<float>(kBlock * width());
  }

  void run(int64_t row, int64_t rows) {
    after_attention(row, rows);
    const bool post = a_.attention_norm.eps >= 0.f;
    for (int64_t m = 0; m < rows; ++m) {
      float* r = residual_ + m * width();
      if (post) {
        norm_row(a_.attention_norm, r, a_.width);
      } else {
        float* y = normed_ + m * width();
        __builtin_memcpy(y, r, size_t(a_.width) * 4);
        norm_row(a_.output_norm, y, a_.width);
      }
    }
    quantize_rows(post ? residual_ : normed_, width(), rows, a_.width, a_.up.group, x_, 0);
    feed_forward(rows);
    for_products(a_.down, activated_, rows, 0, a_.down.out, sums_,
                 [&](int64_t c, int64_t n, int64_t first, int64_t count, const float* from) {
      for (int64_t m = first; m < first + count; ++m, from += kColumns) {
        float* r = residual_ + m * width() + c;
        T* y = static_cast<T*>(a_.y) + (row + m) * a_.width + c;
        for_columns(n, [&](int64_t i, auto part) {
          Vec v = load(from + i);
          if (a_.down.bias) v = v + load(a_.down.bias + c + i, part);
          v = v + load(r + i, part);
          post ? store(r + i, v, part) : store(y + i, v, part);
        });
      }
    });
    if (!post) return;
    for (int64_t m = 0; m < rows; ++m) {
      float* r = residual_ + m * width();
      norm_row(a_.output_norm, r, a_.width);
      T* y = static_cast<T*>(a_.y) + (row + m) * a_.width;
      for_columns(a_.width, [&](int64_t i, auto part) { store(y + i, load(r + i, part), part); });
    }
  }

 private:
  static int64_t round_up_to(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
  int64_t width() const { return a_.width + kWidth; }

  void after_attention(int64_t row, int64_t rows) {
    const auto residual_of = [&](int64_t m) {
      return static_cast<const T*>(a_.residual) + (row + m) * a_.residual_stride;
    };
    with_dtype(a_.context_dtype, [&](auto element) {
      using C = decltype(element);
      quantize_rows(static_cast<const C*>(a_.context) + row * a_.context_stride, a_.context_stride, rows, a_.output.in,
                    a_.output.group, context_, 0);
    });
    for_products(a_.output, context_, rows, 0, a_.output.out, sums_,
                 [&](int64_t c, int64_t n, int64_t first, int64_t count, const float* from) {
      for (int64_t m = first; m < first + count; ++m, from += kColumns) {
        const T* before = residual_of(m) + c;
        float* r = residual_ + m * width() + c;
        for_columns(n, [&](int64_t i, auto part) {
          Vec v = load(from + i);
          if (a_.output.bias) v = v + load(a_.output.bias + c + i, part);
          store(r + i, v + load(before + i, part), part);
        });
      }
    });
  }

  // act(up(x)) [* gate(x)], quantised as soon as a group is complete.
  void feed_forward(int64_t rows) {
    const int64_t group = a_.down.group;  // divides kInner
    with_coarse_activation(a_.activation, [&](auto kind) {
      for_products<kInner>(a_.up, x_, rows, 0, a_.up.out, sums_,
                           [&](int64_t c, int64_t n, int64_t first, int64_t count, const float*) {
        if (gates_)
          multiply_int8(a_.gate, from_row(x_, first), count, c / kPanel, (n + kPanel - 1) / kPanel, gates_, kInner);
        const Int8Rows to = from_row(activated_, first);
        // Results overwrite their sums until the scales of kWidth groups are known.
        const int64_t groups = int8_groups(n, group);
        const auto length = [&](int64_t g) { return n - g * group < group ? n - g * group : group; };
        quantize_groups(
            count * groups,
            [&](int64_t i) {
              const int64_t m = i / groups, g = i % groups;
              float* row = sums_ + m * kInner + g * group;
              const float* gate = gates_ ? gates_ + m * kInner + g * group : nullptr;
              const int64_t column = c + g * group;
              Reach found;
              for_columns(length(g), [&](int64_t k, auto part) {
                Vec v = load(row + k, part), y, slope;
                if (a_.up.bias) v = v + load(a_.up.bias + column + k, part);
                decltype(kind)::compute(v, y, slope);
                if (gate) {
                  Vec by = load(gate + k, part);
                  if (a_.gate.bias) by = by + load(a_.gate.bias + column + k, part);
                  y = y * by;
                }
                store(row + k, y, part);
                found.add(y);
              });
              return found;
            },
            [&](int64_t i, float scale, float zero, float inverse) {
              const int64_t m = i / groups, g = i % groups, at = m * to.groups + c / group + g;
              to.scale[at] = scale;
              to.zero[at] = zero;
              store_quantized(sums_ + m * kInner + g * group, length(g), inverse, zero,
                              to.values + m * to.stride + c + g * group);
            });
      });
    });
  }

  const Int8Block& a_;
  int64_t inner_;
  Int8Rows context_, x_, activated_;
  float *sums_, *gates_, *residual_, *normed_;
};

}  // namespace

void int8_quantize(const float* x, int64_t n, int64_t group, const Int8Rows& to, int64_t row) {
  quantize_rows(x, 0, 1, n, group, to, row);
}

void int8_product(const Int8Weight& w, const Int8Rows& x, int64_t row, int64_t rows, int64_t panel, float* out) {
  multiply_int8(w, from_row(x, row), rows, panel, 1, out, kPanel);
}

void linear_int8(const LinearInt8& a) {
  const Int8Weight& first = a.weights[0];
  int64_t columns = 0, ends[4] = {};  // in units of kColumns
  for (int64_t i = 0; i < a.count; ++i) ends[i] = columns += (a.weights[i].out + kColumns - 1) / kColumns;
  const int64_t threads = tf_num_threads();
  const RowBlocks of(a.rows, threads);
  const int64_t blocks = of.count;
  // With many blocks of rows, each is one item. Otherwise columns are split too, and each thread quantises the rows.
  int64_t parts = (4 * threads + blocks - 1) / blocks;
  if (blocks >= 8 * threads) parts = 1;
  if (parts > columns) parts = columns;
  const double work = double(a.rows) * double(first.in) * double(columns * kColumns);
  share_out(blocks * parts, work < 1e5 ? 1 : threads, [&] {
    Pieces p{static_cast<char*>(
        tf_scratch(0, rows_bytes(kBlock, first.in, first.group) + Pieces::bytes(kPart * kColumns * 4)))};
    const Int8Rows x = take_rows(p, kBlock, first.in, first.group);
    float* sums = p.take<float>(kPart * kColumns);
    return [&a, &of, &first, &ends, x, sums, columns, parts, here = int64_t(-1)](int64_t item) mutable {
      const int64_t block = item / parts, part = item % parts, row = of.begin(block);
      const int64_t rows = of.begin(block + 1) - row;
      if (block != here)
        with_dtype(a.x_dtype, [&](auto element) {
          using T = decltype(element);
          quantize_rows(static_cast<const T*>(a.x) + row * a.x_stride, a.x_stride, rows, first.in, first.group, x, 0);
        });
      here = block;
      const int64_t from = columns * part / parts, to = columns * (part + 1) / parts;
      int64_t at = 0;
      for (int64_t i = 0, before = 0; i < a.count; before = ends[i], at += a.weights[i].out, ++i) {
        const int64_t begin = (from > before ? from - before : 0) * kColumns;
        int64_t end = (to - before) * kColumns;
        if (end > a.weights[i].out) end = a.weights[i].out;
        if (begin >= end) continue;
        with_dtype(a.y_dtype, [&](auto element) {
          linear_columns<decltype(element)>(a, a.weights[i], x, row, rows, begin, end, at, sums);
        });
      }
    };
  });
}

void int8_block(const Int8Block& a) {
  with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    const RowBlocks of(a.rows, tf_num_threads());
    share_out(of.count, tf_num_threads(), [&] {
      return [&of, block = Block<T>(a)](int64_t item) mutable {
        block.run(of.begin(item), of.begin(item + 1) - of.begin(item));
      };
    });
  });
}

}  // namespace tf::TF_ISA
