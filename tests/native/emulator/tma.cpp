// TMA: boxes between global and shared memory, and bulk copies without a map.
#include <algorithm>
#include <deque>

#include "block_async.hpp"

namespace tf::emulator {
namespace {

using cuda::Swizzle;

struct Transfer {
  TensorMap map;  // rank 0: `bytes` in a row at map.base
  Coordinates at;
  uint32_t shared, bytes, bar;
  unsigned thread;
  bool add = false;
  bool taken = false, waited = false;  // a store's source has been read, and that has been waited for
  std::vector<unsigned char> staged;  // and is here
};

uint32_t box_bytes(const TensorMap& m) {
  uint32_t n = uint32_t(m.element);
  for (int i = 0; i < m.rank; ++i) n *= m.box[i];
  return n;
}

// 16-byte chunk at `offset`, as the swizzle of shared memory has it; the block's memory begins at a multiple of 1024.
uint32_t swizzled(uint32_t offset, Swizzle s) {
  const uint32_t chunks = cuda::swizzle_span(s) / 16;
  return offset ^ (((offset >> 7) & (chunks - 1)) << 4);
}

// Calls row(box offset in bytes, global address or null, elements inside from, to) for every innermost row of the box.
template <class F>
void for_rows(const TensorMap& m, const Coordinates& at, F&& row) {
  std::array<uint32_t, 5> i{};
  const uint32_t width = m.box[0];
  const uint32_t rows = box_bytes(m) / (width * uint32_t(m.element));
  for (uint32_t r = 0; r < rows; ++r) {
    bool inside = true;
    unsigned char* address = m.base;
    for (int d = 1; d < m.rank; ++d) {
      const int64_t c = int64_t(at[size_t(d)]) + i[size_t(d)];
      inside &= c >= 0 && uint64_t(c) < m.sizes[d];
      address += c * int64_t(m.strides[d]);
    }
    const int64_t from = std::clamp<int64_t>(-int64_t(at[0]), 0, width);
    const int64_t to = std::clamp<int64_t>(int64_t(m.sizes[0]) - at[0], from, width);
    row(r * width * uint32_t(m.element), address + int64_t(at[0]) * m.element, inside ? from : 0, inside ? to : 0);
    for (int d = 1; d < m.rank && ++i[size_t(d)] == m.box[d]; ++d) i[size_t(d)] = 0;
  }
}

void load(const Transfer& t) {
  const InNameOf name(t.thread);
  unsigned char* shared = block->shared + t.shared;
  if (t.map.rank == 0) {
    std::memcpy(shared, t.map.base, t.bytes);
  } else {
    std::vector<unsigned char> row;
    for_rows(t.map, t.at, [&](uint32_t offset, const unsigned char* global, int64_t from, int64_t to) {
      const int64_t element = t.map.element;
      row.assign(t.map.box[0] * size_t(element), 0);
      if (to > from) {
        check_global(global + from * element, size_t((to - from) * element), 1, false);
        std::memcpy(row.data() + from * element, global + from * element, size_t((to - from) * element));
      }
      for (uint32_t c = 0; c < row.size(); c += 16)
        std::memcpy(block->shared + swizzled(t.shared + offset + c, t.map.swizzle), row.data() + c, 16);
    });
  }
  mbarrier_complete(t.bar, t.bytes);
}

void take(Transfer& t) {
  if (t.taken) return;
  const InNameOf name(t.thread);
  t.staged.resize(t.bytes);
  for (uint32_t c = 0; c < t.bytes; c += 16)
    std::memcpy(t.staged.data() + c, block->shared + swizzled(t.shared + c, t.map.swizzle), 16);
  t.taken = true;
}

void write(unsigned char* global, const unsigned char* from, size_t bytes, bool add) {
  if (!bytes) return;
  check_global(global, bytes, 1, true);
  if (!add) {
    std::memcpy(global, from, bytes);
    return;
  }
  for (size_t i = 0; i < bytes; i += 4) {
    float a, b;
    std::memcpy(&a, global + i, 4);
    std::memcpy(&b, from + i, 4);
    a += b;
    std::memcpy(global + i, &a, 4);
  }
}

void put(Transfer& t) {
  take(t);
  const InNameOf name(t.thread);
  if (t.map.rank == 0) return write(t.map.base, t.staged.data(), t.bytes, t.add);
  for_rows(t.map, t.at, [&](uint32_t offset, unsigned char* global, int64_t from, int64_t to) {
    const int64_t e = t.map.element;
    write(global + from * e, t.staged.data() + offset + from * e, size_t((to - from) * e), t.add);
  });
}

struct Stores {
  std::vector<Transfer> open;
  std::deque<std::vector<Transfer>> groups;
};
std::vector<Transfer> loads;   // under way, of the whole block
std::vector<Stores> stores;  // of each thread

Transfer checked(const TensorMap& map, const void* shared, const Coordinates& at, int coordinates) {
  if (map.rank != coordinates)
    fail("TMA: " + std::to_string(coordinates) + " coordinates for a tensor map of rank " + std::to_string(map.rank));
  Transfer t{map, at, 0, box_bytes(map), 0, block->current->index, false, false, false, {}};
  const auto address = reinterpret_cast<uintptr_t>(shared), base = reinterpret_cast<uintptr_t>(block->shared);
  if (address < base || address + t.bytes > base + block->shared_bytes) fail_shared(address, t.bytes);
  t.shared = uint32_t(address - base);
  const uint32_t alignment = map.swizzle == Swizzle::none ? 128 : 8 * cuda::swizzle_span(map.swizzle);
  if (t.shared % alignment) fail_alignment("shared", t.shared, alignment);
  return t;
}

Transfer checked_row(const void* global, const void* shared, uint32_t bytes, bool write) {
  if (bytes == 0 || bytes % 16) fail("bulk copy of " + std::to_string(bytes) + " bytes: not a multiple of 16");
  check_global(global, bytes, 16, write);
  const auto address = reinterpret_cast<uintptr_t>(shared), base = reinterpret_cast<uintptr_t>(block->shared);
  if (address < base || address + bytes > base + block->shared_bytes) fail_shared(address, bytes);
  if (address % 16) fail_alignment("shared", address, 16);
  TensorMap row{};
  row.base = static_cast<unsigned char*>(const_cast<void*>(global));
  return {row, {}, uint32_t(address - base), bytes, 0, block->current->index, false, false, false, {}};
}

void start_load(Transfer t, uint64_t* bar) {
  ++counters.tma_loads;
  t.bar = mbarrier_checked(bar);
  mbarrier_load_starts(t.bar, t.shared, t.bytes);
  if (!settings.late) return load(t);
  std::memset(block->shared + t.shared, 0xff, t.bytes);
  loads.push_back(t);
}

void start_store(Transfer t) {
  async_read_starts(t.shared, t.bytes);
  if (!settings.late) put(t);
  stores[block->current->index].open.push_back(std::move(t));
}

}  // namespace

std::string make_tensor_map(TensorMap* map, DType dtype, const void* base, int rank, const uint64_t* sizes,
                            const uint64_t* strides_bytes, const uint32_t* box, Swizzle swizzle) {
  TensorMap m{};
  m.base = static_cast<unsigned char*>(const_cast<void*>(base));
  m.rank = rank;
  m.element = dtype == DType::f32 ? 4 : 2;
  m.dtype = dtype;
  m.swizzle = swizzle;
  if (rank < 1 || rank > 5) return "tensor map: rank must be 1..5";
  if (reinterpret_cast<uintptr_t>(base) % 16) return "tensor map: base is not aligned to 16 bytes";
  for (int d = 0; d < rank; ++d) {
    m.sizes[d] = sizes[d];
    m.strides[d] = d ? strides_bytes[d - 1] : uint64_t(m.element);
    m.box[d] = box[d];
    if (sizes[d] == 0 || sizes[d] > (uint64_t(1) << 32)) return "tensor map: sizes must be 1..2^32";
    if (box[d] == 0 || box[d] > 256) return "tensor map: box dimensions must be 1..256";
    if (d && (m.strides[d] % 16 || m.strides[d] >= (uint64_t(1) << 40)))
      return "tensor map: strides must be multiples of 16 bytes below 2^40";
  }
  const uint32_t row = m.box[0] * uint32_t(m.element);
  if (row % 16) return "tensor map: a row of the box must be a multiple of 16 bytes";
  if (swizzle != Swizzle::none && row != cuda::swizzle_span(swizzle))
    return "tensor map: a row of the box must be as long as the swizzle's span";
  *map = m;
  return "";
}

void tma_load(void* shared, const TensorMap& map, uint64_t* bar, Coordinates at, int coordinates) {
  start_load(checked(map, shared, at, coordinates), bar);
}
void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* bar) {
  start_load(checked_row(global, shared, bytes, false), bar);
}
void tma_store(const TensorMap& map, const void* shared, Coordinates at, int coordinates, bool add) {
  Transfer t = checked(map, shared, at, coordinates);
  if (add && map.dtype != DType::f32) fail("tma_reduce_add: the tensor map is not of float32");
  t.add = add;
  start_store(std::move(t));
}
void bulk_reduce_add(float* global, const void* shared, uint32_t bytes) {
  Transfer t = checked_row(global, shared, bytes, true);
  t.add = true;
  start_store(std::move(t));
}

void bulk_commit() {
  Stores& mine = stores[block->current->index];
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}

void bulk_wait(int left, bool read_only) {
  Stores& mine = stores[block->current->index];
  for (int g = 0; g + left < int(mine.groups.size()); ++g) {
    for (Transfer& t : mine.groups[size_t(g)]) {
      take(t);
      if (!t.waited) async_read_ends(t.shared, t.bytes);
      t.waited = true;
    }
  }
  while (!read_only && int(mine.groups.size()) > left) {
    if (settings.late) std::for_each(mine.groups.front().begin(), mine.groups.front().end(), put);
    mine.groups.pop_front();
  }
}

bool finish_some_load() {
  if (loads.empty()) return false;
  const size_t i = random() % loads.size();  // in any order
  const Transfer t = std::move(loads[i]);
  loads.erase(loads.begin() + ptrdiff_t(i));
  load(t);
  return true;
}

void bulk_begin() {
  loads.clear();
  stores.assign(block->threads, {});
}

void bulk_thread_exits() {
  Stores& mine = stores[block->current->index];
  if (!mine.open.empty()) fail("exits with bulk stores that bulk_commit has not closed");
  for (auto& group : mine.groups) {
    for (Transfer& t : group) {
      if (!t.waited) fail("exits before bulk_wait_read: the stores may read shared memory that is gone");
    }
    if (settings.late) std::for_each(group.begin(), group.end(), put);
  }
}

void bulk_end() {
  if (!loads.empty()) fail("ends while " + std::to_string(loads.size()) + " TMA loads are under way");
}

}  // namespace tf::emulator
