// Arguments of the hash of memory.
#pragma once
#include <cstddef>
#include <cstdint>

namespace tf {

constexpr int64_t kHashBlock = 1 << 20;  // bytes that are hashed by themselves
inline int64_t hash_blocks(int64_t bytes) { return bytes > kHashBlock ? (bytes + kHashBlock - 1) / kHashBlock : 1; }

struct HashedMemory {
  const uint8_t* data;
  int64_t bytes, first_block;
};

// hashes[b]: of block b; blocks are numbered through all pieces of memory, of which even an empty one has a block.
struct ContentHash {
  const HashedMemory* memory;
  int64_t count, blocks, bytes;
  uint64_t* hashes;
};

// Of a sequence of values: each counts, and its place.
inline uint64_t hash_mix(uint64_t state, uint64_t value) {
  state ^= value;
  state = (state << 29 | state >> 35) * 0x9E3779B97F4A7C15u;
  return state ^ state >> 32;
}

}  // namespace tf
