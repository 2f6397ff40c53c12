// A 64-bit hash of memory, at memory bandwidth: tells whether bytes have changed.
#include "content_hash.hpp"

#include "kernels.hpp"
#include "parallel.hpp"

namespace tf::TF_ISA {
namespace {

constexpr int kLanes = 32;  // 64-bit words side by side: enough chains to hide a multiplication
constexpr uint64_t kSpread = 0xA0761D6478BD642Fu, kPrime = 0xD6E8FEB86659FD93u;  // odd

// Each step is a bijection of the lane for a given word, and of the word for a given lane: a difference in one word
// never vanishes. A product alone would leave a changed top bit in place, and two changed signs could cancel. So words
// are mixed before they are added to the lane, and the lane is rotated.
void add_words(uint64_t* lanes, const uint8_t* from) {
  uint64_t words[kLanes];
  __builtin_memcpy(words, from, sizeof words);
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t word = words[i] * kSpread, v = lanes[i] ^ word ^ word >> 32;
    lanes[i] = (v << 29 | v >> 35) * kPrime;
  }
}

uint64_t hash_block(const uint8_t* data, int64_t bytes) {
  uint64_t lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = hash_mix(uint64_t(bytes), uint64_t(i + 1));
  constexpr int64_t step = int64_t(sizeof lanes);
  int64_t at = 0;
  for (; at + step <= bytes; at += step) add_words(lanes, data + at);
  if (at < bytes) {
    uint8_t rest[step] = {};
    __builtin_memcpy(rest, data + at, size_t(bytes - at));
    add_words(lanes, rest);
  }
  uint64_t hash = uint64_t(bytes);
  for (int i = 0; i < kLanes; ++i) hash = hash_mix(hash, lanes[i]);
  return hash;
}

}  // namespace

void content_hash(const ContentHash& a) {
  const int64_t alone = 1 + (int64_t(1) << 18) * a.blocks / (a.bytes + 1);  // blocks that are worth a thread
  parallel_for(a.blocks, alone, [&](int64_t begin, int64_t end) {
    int64_t low = 0, high = a.count;  // low becomes the last piece of memory that begins at or before `begin`
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (a.memory[middle].first_block <= begin ? low : high) = middle;
    }
    for (int64_t block = begin; block < end; ++block) {
      if (low + 1 < a.count && a.memory[low + 1].first_block == block) ++low;
      const HashedMemory& m = a.memory[low];
      const int64_t at = (block - m.first_block) * kHashBlock, left = m.bytes - at;
      a.hashes[block] = hash_block(m.data + at, left < kHashBlock ? left : kHashBlock);
    }
  });
}

}  // namespace tf::TF_ISA
