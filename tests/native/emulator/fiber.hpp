// Switching stacks: a few nanoseconds on x86-64, ucontext elsewhere.
#pragma once
#include <cstddef>

namespace tf::emulator {

// A fiber that will run entry(), which must never return, on the stack that ends at `top`.
void* fiber_new(char* bottom, size_t bytes, void (*entry)());
// Saves where this fiber is in *from and goes on where `to` was saved.
void fiber_switch(void** from, void* to);

}  // namespace tf::emulator
