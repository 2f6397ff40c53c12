#include "block_async.hpp"

namespace tf::emulator {

void touch_shared(uint32_t, uint32_t, bool) {}
void touch_shared_async(uint32_t, uint32_t, bool) {}
void fence_async_shared() {}
void races_begin() {}
void barrier_arrived(int) {}
void barrier_complete(int) {}
void barrier_passed(int, Thread&) {}

}  // namespace tf::emulator
