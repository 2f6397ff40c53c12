// wgmma: products of a warpgroup, issued by its four warps one after another, finished in order behind their backs.
#include <deque>
#include <map>
#include <memory>

#include "block_async.hpp"
#include "simt.cuh"

namespace tf::emulator {
namespace {

constexpr unsigned kGroup = 128;

// An accumulator that products are under way for: its true value is here, NaN in the thread's registers.
struct Accumulator {
  float* registers;
  std::vector<float> value;
  uint64_t last = 0;  // the product that writes it last
};
struct Operation {
  Product product;
  unsigned warps = 0;  // that have issued it, one bit each
  bool done = false;
  std::vector<Accumulator*> accumulators = std::vector<Accumulator*>(kGroup);
  std::vector<std::array<uint32_t, 4>> a = std::vector<std::array<uint32_t, 4>>(kGroup);
};
struct Warpgroup {
  std::deque<Operation> operations;  // from `first` on
  uint64_t first = 0;
};
struct Warp {
  uint64_t issued = 0, finished = 0;   // products; finished: by its own waits
  std::deque<uint64_t> groups;         // `issued` at each commit that is not waited for
  bool fenced = false, open = false;   // open: issued and not committed
};
std::vector<Warpgroup> warpgroups;
std::vector<Warp> warps;
std::vector<std::map<float*, std::unique_ptr<Accumulator>>> accumulators;  // of each thread

Warp& my_warp() { return warps[block->current->index / kWarp]; }

float decode(bool half, uint16_t bits) {
  return half ? cuda::to_float(cuda::half_t{bits}) : cuda::to_float(cuda::bf16_t{bits});
}

struct Descriptor {
  uint32_t start, leading, stride;
  cuda::Swizzle swizzle;

  explicit Descriptor(uint64_t d)
      : start(uint32_t(d & 0x3fff) << 4), leading(uint32_t(d >> 16 & 0x3fff) << 4),
        stride(uint32_t(d >> 32 & 0x3fff) << 4) {
    constexpr cuda::Swizzle kinds[4] = {cuda::Swizzle::none, cuda::Swizzle::b128, cuda::Swizzle::b64,
                                        cuda::Swizzle::b32};
    swizzle = kinds[d >> 62];
    const uint32_t span = cuda::swizzle_span(swizzle);
    if (start < kSharedBase) fail("wgmma descriptor: its address is not in dynamic shared memory");
    start -= kSharedBase;
    if (swizzle != cuda::Swizzle::none && start % (8 * span) >= span)
      fail("wgmma descriptor: the matrix begins " + std::to_string(start % (8 * span)) +
           " bytes into a swizzle atom, past its first row");
  }

  // Of the element at `i` along M or N and `k` along K, by CUTLASS's canonical layouts of the PTX ISA.
  uint32_t offset(bool transposed, uint32_t i, uint32_t k) const {
    uint32_t o;
    const uint32_t span = cuda::swizzle_span(swizzle), wide = span / 2;
    if (swizzle == cuda::Swizzle::none) {
      o = transposed ? (i % 8) * 2 + (i / 8) * stride + (k % 8) * 16 + (k / 8) * leading
                     : (k % 8) * 2 + (k / 8) * leading + (i % 8) * 16 + (i / 8) * stride;
    } else {
      o = transposed ? (i % wide) * 2 + (i / wide) * leading + (k % 8) * span + (k / 8) * stride
                     : k * 2 + (i % 8) * span + (i / 8) * stride;
    }
    o += start;
    return o ^ (((o >> 7) & (span / 16 - 1)) << 4);
  }

  // rows x 16, as floats.
  void read(bool transposed, bool half, uint32_t rows, float* out) const {
    for (uint32_t i = 0; i < rows; ++i) {
      for (uint32_t k = 0; k < 16; ++k) {
        const uint32_t o = offset(transposed, i, k);
        if (o + 2 > block->shared_bytes)
          fail_shared(reinterpret_cast<uintptr_t>(block->shared) + o, 2);
        uint16_t bits;
        std::memcpy(&bits, block->shared + o, 2);
        out[i * 16 + k] = decode(half, bits);
      }
    }
  }

  // f(offset) for every 16-byte chunk of rows from .. to.
  template <class F>
  void chunks(bool transposed, uint32_t from, uint32_t to, F&& f) const {
    for (uint32_t i = from; i < to; i += transposed ? 8 : 1) {
      for (uint32_t k = 0; k < 16; k += transposed ? 1 : 8) f(offset(transposed, i, k));
    }
  }
};

void run(Operation& op) {
  ++counters.wgmma;
  const Product& p = op.product;
  const auto n = uint32_t(p.n);
  static std::vector<float> a(64 * 16), b(256 * 16), bt(256 * 16), d(64 * 256);
  if (p.a_shared) {
    Descriptor(p.a).read(p.a_transposed, p.half, 64, a.data());
  } else {
    for (unsigned t = 0; t < kGroup; ++t) {
      const unsigned g = t / kWarp * 16 + t % kWarp / 4, c = 2 * (t % 4);
      for (unsigned r = 0; r < 4; ++r) {
        float* to = a.data() + (g + 8 * (r % 2)) * 16 + c + 8 * (r / 2);
        to[0] = decode(p.half, uint16_t(op.a[t][r]));
        to[1] = decode(p.half, uint16_t(op.a[t][r] >> 16));
      }
    }
  }
  Descriptor(p.b).read(p.b_transposed, p.half, n, b.data());
  for (uint32_t k = 0; k < 16; ++k) {
    for (uint32_t j = 0; j < n; ++j) bt[k * n + j] = b[j * 16 + k];
  }
  std::fill_n(d.begin(), 64 * n, 0.f);
  for (uint32_t i = 0; i < 64; ++i) {
    float* row = d.data() + i * n;
    for (uint32_t k = 0; k < 16; ++k) {
      const float x = a[i * 16 + k];
      const float* y = bt.data() + k * n;
      for (uint32_t j = 0; j < n; ++j) row[j] += x * y[j];
    }
  }
  for (unsigned t = 0; t < kGroup; ++t) {
    std::vector<float>& value = op.accumulators[t]->value;
    for (uint32_t e = 0; e < n / 2; ++e) {
      const uint32_t row = t / kWarp * 16 + t % kWarp / 4 + e % 4 / 2 * 8, column = e / 4 * 8 + t % 4 * 2 + e % 2;
      const float x = d[row * n + column];
      value[e] = p.accumulate ? value[e] + x : x;
    }
  }
  op.done = true;
}

void deliver(std::map<float*, std::unique_ptr<Accumulator>>& mine, uint64_t finished) {
  for (auto it = mine.begin(); it != mine.end();) {
    Accumulator& a = *it->second;
    if (a.last >= finished) {
      ++it;
      continue;
    }
    std::copy(a.value.begin(), a.value.end(), a.registers);
    it = mine.erase(it);
  }
}

// For the detector of races: what one warp reads of shared memory, its own 16 rows of A.
void touch(const Product& p, unsigned warp_of_group, void (*access)(uint32_t, uint32_t)) {
  const auto chunk = [&](uint32_t offset) {
    if (offset + 16 > block->shared_bytes) fail_shared(reinterpret_cast<uintptr_t>(block->shared) + offset, 16);
    access(offset, 16);
  };
  if (p.a_shared) Descriptor(p.a).chunks(p.a_transposed, warp_of_group * 16, warp_of_group * 16 + 16, chunk);
  Descriptor(p.b).chunks(p.b_transposed, 0, uint32_t(p.n), chunk);
}

struct Issue {
  const Product* product;
  float* d;
  const uint32_t* a;
  unsigned thread;
};

bool same(const Product& x, const Product& y) {
  return x.half == y.half && x.n == y.n && x.a_transposed == y.a_transposed && x.b_transposed == y.b_transposed &&
         x.accumulate == y.accumulate && x.a_shared == y.a_shared && x.a == y.a && x.b == y.b;
}

void execute_issue(void* const* payloads, unsigned) {
  const auto lane_of = [&](unsigned l) -> const Issue& { return *static_cast<Issue*>(payloads[l]); };
  const unsigned thread = lane_of(0).thread, group = thread / kGroup;
  Warp& warp = warps[thread / kWarp];
  Warpgroup& wg = warpgroups[group];
  const Product& p = *lane_of(0).product;
  if ((group + 1) * kGroup > block->threads) fail("wgmma: the warpgroup has fewer than 128 threads");
  if (!warp.fenced)
    fail("wgmma without warpgroup_fence since the last wait or commit: registers may not be written yet");
  const uint64_t index = warp.issued++;
  warp.open = true;
  if (index - wg.first == wg.operations.size()) {
    wg.operations.emplace_back();
    wg.operations.back().product = p;
  }
  Operation& op = wg.operations[index - wg.first];
  for (unsigned l = 0; l < kWarp; ++l) {
    if (!same(*lane_of(l).product, op.product)) fail("wgmma: threads of the warpgroup give different operands");
    auto& slot = accumulators[thread + l][lane_of(l).d];
    const size_t n = size_t(p.n) / 2;
    if (!slot) {
      slot = std::make_unique<Accumulator>();
      slot->registers = lane_of(l).d;
      slot->value.assign(lane_of(l).d, lane_of(l).d + n);
      std::fill_n(lane_of(l).d, n, std::numeric_limits<float>::quiet_NaN());
    }
    if (slot->value.size() != n) fail("wgmma: an accumulator is used in two shapes at once");
    slot->last = index;
    const unsigned place = (thread + l) % kGroup;
    op.accumulators[place] = slot.get();
    if (lane_of(l).a) std::copy_n(lane_of(l).a, 4, op.a[place].begin());
  }
  touch(p, thread % kGroup / kWarp, async_read_starts);
  op.warps |= 1u << (thread % kGroup / kWarp);
  if (op.warps != 0xf) return;
  if (!settings.late) {
    for (Operation& each : wg.operations) {
      if (each.warps != 0xf) break;
      if (!each.done) run(each);
    }
    for (unsigned t = group * kGroup; t < (group + 1) * kGroup; ++t) deliver(accumulators[t], index + 1);
  }
  for (unsigned t = group * kGroup; t < (group + 1) * kGroup; ++t) {
    if (block->all[t].wait == Wait::warpgroup) wake(block->all[t]);
  }
}

void execute_fence(void* const*, unsigned) { my_warp().fenced = true; }

void execute_commit(void* const*, unsigned) {
  Warp& w = my_warp();
  w.groups.push_back(w.issued);
  w.fenced = w.open = false;
}

}  // namespace

void wgmma(const Product& product, float* d, const uint32_t* a) {
  Issue issue{&product, d, a, block->current->index};
  warp_instruction("wgmma.mma_async", ~0u, &issue, execute_issue);
}

void warpgroup_fence() { warp_instruction("wgmma.fence", ~0u, nullptr, execute_fence); }
void warpgroup_commit() { warp_instruction("wgmma.commit_group", ~0u, nullptr, execute_commit); }

void warpgroup_wait(int left) {
  warp_instruction("wgmma.wait_group", ~0u, nullptr, no_payload);
  const unsigned thread = block->current->index;
  Warp& w = my_warp();
  w.fenced = false;
  uint64_t finished = w.finished;
  if (int(w.groups.size()) > left) finished = w.groups[w.groups.size() - 1 - size_t(left)];
  Warpgroup& wg = warpgroups[thread / kGroup];
  for (uint64_t i = wg.first; i < finished; ++i) {
    while (wg.operations[i - wg.first].warps != 0xf) sleep(Wait::warpgroup, "wgmma.wait_group");
  }
  for (uint64_t i = wg.first; i < finished; ++i) {
    Operation& op = wg.operations[i - wg.first];
    if (!op.done) run(op);
  }
  deliver(accumulators[thread], finished);
  // The last lane of the warp to come through here retires the groups.
  warp_instruction("wgmma.wait_group", ~0u, &finished, [](void* const* payloads, unsigned) {
    Warp& warp = my_warp();
    const unsigned place = block->current->index % kGroup / kWarp;
    Warpgroup& mine = warpgroups[block->current->index / kGroup];
    for (uint64_t i = warp.finished; i < *static_cast<uint64_t*>(payloads[0]); ++i)
      touch(mine.operations[i - mine.first].product, place, async_read_ends);
    warp.finished = *static_cast<uint64_t*>(payloads[0]);
    while (!warp.groups.empty() && warp.groups.front() <= warp.finished) warp.groups.pop_front();
    uint64_t oldest = ~uint64_t(0);
    for (unsigned i = 0; i < 4; ++i) oldest = std::min(oldest, warps[block->current->index / kGroup * 4 + i].finished);
    for (; mine.first < oldest; ++mine.first) mine.operations.pop_front();
  });
}

void products_begin() {
  const size_t n = (block->threads + kGroup - 1) / kGroup;
  warpgroups.assign(n, {});
  warps.assign(n * 4, {});
  accumulators.clear();
  accumulators.resize(n * kGroup);
}

void products_thread_exits() {
  Warp& w = my_warp();
  if (w.open) fail("exits with wgmma products that warpgroup_commit has not closed");
  if (!w.groups.empty()) fail("exits with wgmma products that warpgroup_wait has not waited for");
}

}  // namespace tf::emulator
