// cp.async: each thread's own copies, in groups.
#include <algorithm>
#include <deque>

#include "async.hpp"
#include "block_async.hpp"

namespace tf::emulator {
namespace {

struct Copy {
  unsigned char* shared;
  const void* global;
  int bytes;
  bool valid;
};
struct Copies {
  std::vector<Copy> open;                 // not committed yet
  std::deque<std::vector<Copy>> groups;  // oldest first
};
std::vector<Copies> copies;  // of each thread of the block

void run(const Copy& c) {
  if (c.valid) {
    std::memcpy(c.shared, c.global, size_t(c.bytes));
  } else {
    std::memset(c.shared, 0, size_t(c.bytes));
  }
}

}  // namespace

void cp_async(void* shared, const void* global, int bytes, bool valid) {
  ++counters.cp_async;
  check_shared(shared, size_t(bytes), size_t(bytes), true);
  if (valid) check_global(global, size_t(bytes), size_t(bytes), false);
  const Copy c{static_cast<unsigned char*>(shared), global, bytes, valid};
  if (settings.late) {
    std::memset(shared, 0xff, size_t(bytes));
  } else {
    run(c);
  }
  copies[block->current->index].open.push_back(c);
}

void cp_async_commit() {
  Copies& mine = copies[block->current->index];
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}

void cp_async_wait(int left) {
  Copies& mine = copies[block->current->index];
  while (int(mine.groups.size()) > left) {
    if (settings.late) std::for_each(mine.groups.front().begin(), mine.groups.front().end(), run);
    mine.groups.pop_front();
  }
}

void copies_begin() { copies.assign(block->threads, {}); }

}  // namespace tf::emulator
