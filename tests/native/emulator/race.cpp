// Races on shared memory, found by vector clocks: two accesses of a word, one of them a write, by different warps, with
// no barrier or mbarrier that orders them, are a fault in whatever order they happened to run. Likewise plain writes
// that TMA or wgmma reads with no fence.proxy.async on the way.
//
// Two that write the same value do no harm: a reader must have been told of one of them. Lanes of a warp count as one.
// TMA loads count as written by their mbarrier's phase.
#include <algorithm>
#include <unordered_map>

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
  bool twins = false;                     // others wrote the same value since
};
struct Writer {
  unsigned warp;
  uint32_t time;
};
struct Meeting {
  Knowledge gathering, release;
};

std::vector<Word> words;
std::unordered_map<uint32_t, std::vector<Writer>> twins;  // of words that say so
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

// f(warp or actor, time) for whoever wrote what a word holds now.
template <class F>
bool any_writer(uint32_t w, F&& f) {
  const Word& word = words[w];
  if (f(word.writer, word.written)) return true;
  if (!word.twins) return false;
  const std::vector<Writer>& others = twins[w];
  return std::any_of(others.begin(), others.end(), [&](const Writer& o) { return f(o.warp, o.time); });
}

// as, time: whose write it will be. value: of a plain write, where it is known.
void check_write(uint32_t offset, uint32_t bytes, bool async, unsigned as, uint32_t time, const void* value) {
  const Knowledge& mine = warps[me()];
  const uint8_t half = halves(offset, bytes);
  const auto count = unsigned(warps.size());
  const bool same = value && std::memcmp(block->shared + offset, value, bytes) == 0;
  for (uint32_t w = offset / 4; w < (offset + bytes + 3) / 4; ++w) {
    Word& word = words[w];
    const char* const what = async ? "a TMA load is started" : "written";
    const auto unseen = [&](unsigned writer, uint32_t at) { return at > mine.seen[writer]; };
    const bool unseen_write = (word.write_half & half) && any_writer(w, unseen);
    unsigned reader = 0;
    while (reader < count && !(reads[w][reader] > mine.seen[reader] && (word.read_half & half))) ++reader;
    if (same && (unseen_write || reader < count)) {
      if (!word.twins) twins[w].clear();
      word.twins = true;
      twins[w].push_back({as, time});
      continue;
    }
    if (unseen_write) fail_race(w, what, writer_name(word.writer));
    if (reader < count) fail_race(w, what, "read by warp " + std::to_string(reader));
    const auto unfenced = [&](unsigned by, uint32_t at) { return by < kWarps && at > base && at > mine.fenced[by]; };
    if (async && any_writer(w, unfenced))
      fail("shared memory at offset " + std::to_string(w * 4) + ": TMA writes over what warp " +
           std::to_string(word.writer) + " wrote, with no fence_async_shared between");
    word.write_half = word.writer == as && word.written == time ? uint8_t(word.write_half | half) : half;
    word.writer = uint8_t(as);
    word.written = time;
    word.twins = false;
    if (half == 3) word.read_half = 0;
  }
}

void check_read(uint32_t offset, uint32_t bytes, bool async, bool record) {
  const unsigned warp = me();
  const Knowledge& mine = warps[warp];
  const uint8_t half = halves(offset, bytes);
  for (uint32_t w = offset / 4; w < (offset + bytes + 3) / 4; ++w) {
    Word& word = words[w];
    if ((word.write_half & half) && !any_writer(w, [&](unsigned by, uint32_t at) { return at <= mine.seen[by]; }))
      fail_race(w, "read", writer_name(word.writer));
    if (async &&
        !any_writer(w, [&](unsigned by, uint32_t at) { return by >= kWarps || at <= base || at <= mine.fenced[by]; }))
      fail("shared memory at offset " + std::to_string(w * 4) + ": TMA or wgmma reads what warp " +
           std::to_string(word.writer) + " wrote, with no fence_async_shared between");
    if (!record) continue;
    word.read_half |= half;
    reads[w][warp] = mine.seen[warp];
  }
}

}  // namespace

void touch_shared(uint32_t offset, uint32_t bytes, bool write, const void* value) {
  if (write) {
    check_write(offset, bytes, false, me(), warps[me()].seen[me()], value);
  } else {
    check_read(offset, bytes, false, true);
  }
}

void async_load_starts(uint32_t offset, uint32_t bytes, unsigned mbarrier, uint64_t phase) {
  const uint32_t time = base + 1 + uint32_t(phase);
  latest = std::max(latest, time);
  check_write(offset, bytes, true, kWarps + mbarrier, time, nullptr);
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
