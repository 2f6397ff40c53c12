#include "cpu/content_hash.hpp"

#include <vector>

#include "tensors.hpp"

namespace tf {
namespace {

void content_hash(std::vector<Tensor> tensors, Tensor hashes) {
  STD_TORCH_CHECK(int64_t(hashes.numel()) == int64_t(tensors.size()), "hashes: wanted one for each of ", tensors.size(),
                  " tensors, got ", hashes.numel());
  std::vector<HashedMemory> memory;
  ContentHash a{};
  for (const Tensor& t : tensors) {
    const int64_t bytes = int64_t(t.numel()) * int64_t(t.element_size());
    memory.push_back({read<uint8_t>(t), bytes, a.blocks});
    a.blocks += hash_blocks(bytes);
    a.bytes += bytes;
  }
  std::vector<uint64_t> found(size_t(a.blocks));
  a.memory = memory.data();
  a.count = int64_t(memory.size());
  a.hashes = found.data();
  kernels().content_hash(a);
  int64_t* out = write<int64_t>(hashes);
  for (size_t i = 0; i < memory.size(); ++i) {
    uint64_t hash = uint64_t(memory[i].bytes);
    for (int64_t b = 0; b < hash_blocks(memory[i].bytes); ++b) hash = hash_mix(hash, found[size_t(memory[i].first_block + b)]);
    out[i] = int64_t(hash);
  }
}

}  // namespace
}  // namespace tf

STABLE_TORCH_LIBRARY_IMPL(transformer_fast, CPU, m) { m.impl("cpu_content_hash", TORCH_BOX(&tf::content_hash)); }
