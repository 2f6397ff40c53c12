#include "cpu/content_hash.hpp"

#include <algorithm>
#include <utility>
#include <vector>

#include "check.hpp"

namespace tf {
namespace {

// Whether the tensor's memory has no gaps, in any order of axes.
bool is_dense(const Tensor& t) {
  if (!t.numel() || t.is_contiguous()) return true;
  std::vector<std::pair<int64_t, int64_t>> axes;  // stride, size
  for (int64_t i = 0; i < t.dim(); ++i)
    if (t.size(i) > 1) axes.push_back({t.stride(i), t.size(i)});
  std::sort(axes.begin(), axes.end());
  int64_t next = 1;
  for (const auto& [stride, size] : axes) {
    if (stride != next) return false;
    next *= size;
  }
  return true;
}

void content_hash(std::vector<Tensor> tensors, Tensor hashes) {
  const Check check(hashes);
  check(hashes, "hashes").dtype(ScalarType::Long).numel(int64_t(tensors.size())).contiguous();
  std::vector<HashedMemory> memory;
  ContentHash a{};
  for (const Tensor& t : tensors) {
    check(t, "tensors");
    STD_TORCH_CHECK(is_dense(t), "transformer_fast: tensors: wanted memory without gaps");
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
    for (int64_t b = 0; b < hash_blocks(memory[i].bytes); ++b)
      hash = hash_mix(hash, found[size_t(memory[i].first_block + b)]);
    out[i] = int64_t(hash);
  }
}

}  // namespace
}  // namespace tf

STABLE_TORCH_LIBRARY_IMPL(transformer_fast, CPU, m) { m.impl("cpu_content_hash", TORCH_BOX(&tf::content_hash)); }
