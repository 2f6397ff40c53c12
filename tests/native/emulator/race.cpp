// Races on shared memory, found by vector clocks: two accesses of a word, one of them a write, by different warps, with
// no barrier or mbarrier that orders them, are a fault in whatever order they happened to run. Likewise plain writes
// that TMA or wgmma reads with no fence.proxy.async on the way.
//
// Lanes of a warp count as one. TMA loads count as written by their mbarrier's phase.
#include <algorithm>

#include "block_async.hpp"

namespace tf::emulator {
namespace {

constexpr unsigned kWarps = 32, kActors = kWarps + 64;

using Clock = std::array<uint32_t, kActors>;

void join(Clock& into, const Clock& from) {
  for (unsigned i = 0; i < kActors; ++i) into[i] = std::max(into[i], from[i]);
}

// What someone knows has happened, and of that, what is fenced for the asynchronous proxy.
struct Knowledge {
  Clock seen{}, fenced{};
  void learn(const Knowledge& other) {
    join(seen, other.seen);
    join(fenced, other.fenced);
  }
};
struct Word {
  uint32_t written = 0;  // the writer's time; its number
  uint8_t writer = 0;
  uint8_t write_half = 0, read_half = 0;  // which 16 bits
};
struct Meeting {
  Knowledge gathering, release;
};

std::vector<Word> words;
std::vector<std::array<uint32_t, kWarps>> reads;  // when each warp last read each word
std::vector<Knowledge> warps;
std::array<Meeting, 16> barriers;
std::vector<Meeting> mbarriers;
uint32_t base = 0, latest = 0;  // time goes on from block to block, so that nothing need be cleared

unsigned me() { return block->current->index / kWarp; }

void tick(unsigned warp) {
  const uint32_t now = ++warps[warp].seen[warp];
  latest = std::max(latest, now);
}

[[noreturn]] void fail_race(uint32_t word, const char* now, const std::string& before) {
  fail("race on shared memory at offset " + std::to_string(word * 4) + ": " + now + " by warp " +
       std::to_string(me()) + ", " + before + ", with nothing that orders the two");
}

std::string writer_name(unsigned writer) {
  return writer < kWarps ? "written by warp " + std::to_string(writer)
                         : "written by TMA (mbarrier number " + std::to_string(writer - kWarps) + ")";
}

uint8_t halves(uint32_t offset, uint32_t bytes) { return bytes >= 4 ? 3 : offset % 4 ? 2 : 1; }

void check_write(uint32_t offset, uint32_t bytes, bool async, unsigned as, uint32_t time) {
  const unsigned warp = me();
  const Knowledge& mine = warps[warp];
  const uint8_t half = halves(offset, bytes);
  const auto count = unsigned(warps.size());
  for (uint32_t w = offset / 4; w < (offset + bytes + 3) / 4; ++w) {
    Word& word = words[w];
    if (word.written > mine.seen[word.writer] && (word.write_half & half))
      fail_race(w, async ? "a TMA load is started" : "written", writer_name(word.writer));
    if (async && word.writer < kWarps && word.written > base && word.written > mine.fenced[word.writer])
      fail("shared memory at offset " + std::to_string(w * 4) + ": TMA writes over what warp " +
           std::to_string(word.writer) + " wrote, with no fence_async_shared between");
    for (unsigned v = 0; v < count; ++v) {
      if (reads[w][v] > mine.seen[v] && (word.read_half & half))
        fail_race(w, async ? "a TMA load is started" : "written", "read by warp " + std::to_string(v));
    }
    word.write_half = word.writer == as && word.written == time ? uint8_t(word.write_half | half) : half;
    word.writer = uint8_t(as);
    word.written = time;
  }
}

void check_read(uint32_t offset, uint32_t bytes, bool async, bool record) {
  const unsigned warp = me();
  const Knowledge& mine = warps[warp];
  const uint8_t half = halves(offset, bytes);
  for (uint32_t w = offset / 4; w < (offset + bytes + 3) / 4; ++w) {
    Word& word = words[w];
    if (word.written > mine.seen[word.writer] && (word.write_half & half))
      fail_race(w, "read", writer_name(word.writer));
    if (async && word.writer < kWarps && word.written > base && word.written > mine.fenced[word.writer])
      fail("shared memory at offset " + std::to_string(w * 4) + ": TMA or wgmma reads what warp " +
           std::to_string(word.writer) + " wrote, with no fence_async_shared between");
    if (!record) continue;
    word.read_half = uint8_t(reads[w][warp] > base ? word.read_half | half : half | (word.read_half & 3));
    reads[w][warp] = mine.seen[warp];
  }
}

}  // namespace

void touch_shared(uint32_t offset, uint32_t bytes, bool write) {
  if (write) {
    check_write(offset, bytes, false, me(), warps[me()].seen[me()]);
  } else {
    check_read(offset, bytes, false, true);
  }
}

void async_load_starts(uint32_t offset, uint32_t bytes, unsigned mbarrier, uint64_t phase) {
  const uint32_t time = base + 1 + uint32_t(phase);
  latest = std::max(latest, time);
  check_write(offset, bytes, true, kWarps + mbarrier, time);
}
void async_read_starts(uint32_t offset, uint32_t bytes) { check_read(offset, bytes, true, false); }
void async_read_ends(uint32_t offset, uint32_t bytes) { check_read(offset, bytes, true, true); }

void fence_async_shared() {
  Knowledge& mine = warps[me()];
  mine.fenced = mine.seen;
  tick(me());
}

void races_begin() {
  const size_t n = (block->shared_bytes + 3) / 4;
  if (words.size() < n) {
    words.resize(n);
    reads.resize(n);
  }
  base = latest;
  warps.assign((block->threads + kWarp - 1) / kWarp, {});
  for (size_t w = 0; w < warps.size(); ++w) {
    warps[w].seen.fill(base);
    warps[w].seen[w] = base + 1;
  }
  latest = base + 1;
  barriers = {};
  mbarriers.clear();
}

void barrier_arrived(int id) {
  barriers[size_t(id)].gathering.learn(warps[me()]);
  tick(me());
}
void barrier_complete(int id) {
  Meeting& b = barriers[size_t(id)];
  b.release = b.gathering;
  b.gathering = {};
}
void barrier_passed(int id, Thread& thread) { warps[thread.index / kWarp].learn(barriers[size_t(id)].release); }

unsigned mbarrier_meeting() {
  if (mbarriers.size() == kActors - kWarps) fail("more than 64 mbarriers in a block");
  mbarriers.emplace_back();
  return unsigned(mbarriers.size() - 1);
}
void mbarrier_arrived(unsigned number) {
  mbarriers[number].gathering.learn(warps[me()]);
  tick(me());
}
void mbarrier_phase_over(unsigned number, uint64_t phase) {
  Meeting& m = mbarriers[number];
  m.gathering.seen[kWarps + number] = base + 1 + uint32_t(phase);
  m.release = m.gathering;
}
void mbarrier_passed(unsigned number) { warps[me()].learn(mbarriers[number].release); }

}  // namespace tf::emulator
