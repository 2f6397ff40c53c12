// Arguments of the hash of memory.
#pragma once
#include <cstddef>
#include <cstdint>

namespace tf {

constexpr int64_t kHashBlock = 1 << 20;  // bytes per hash
inline int64_t hash_blocks(int64_t bytes) { return bytes > kHashBlock ? (bytes + kHashBlock - 1) / kHashBlock : 1; }

struct HashedMemory {
  const uint8_t* data;
  int64_t bytes, first_block;
};

// hashes[b]: of block b. Blocks are numbered across all pieces of memory; an empty piece also has one block.
struct ContentHash {
  const HashedMemory* memory;
  int64_t count, blocks, bytes;
  uint64_t* hashes;
};

// One step of the hash of a sequence of values.
inline uint64_t hash_mix(uint64_t state, uint64_t value) {
  state ^= value;
  state = (state << 29 | state >> 35) * 0x9E3779B97F4A7C15u;
  return state ^ state >> 32;
}

}  // namespace tf
