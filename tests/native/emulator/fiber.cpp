#include "fiber.hpp"

#include <cstdint>

#if defined(__x86_64__)

asm(R"(
.text
.globl tf_fiber_switch
.hidden tf_fiber_switch
.type tf_fiber_switch, @function
tf_fiber_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size tf_fiber_switch, .-tf_fiber_switch
)");
extern "C" void tf_fiber_switch(void** from, void* to);

namespace tf::emulator {

void* fiber_new(char* bottom, size_t bytes, void (*entry)()) {
  auto top = (reinterpret_cast<uintptr_t>(bottom) + bytes) & ~uintptr_t(15);
  auto* sp = reinterpret_cast<void**>(top);
  *--sp = nullptr;  // the return address of entry: none; also keeps the stack aligned as after a call
  *--sp = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  return sp;
}

void fiber_switch(void** from, void* to) { tf_fiber_switch(from, to); }

}  // namespace tf::emulator

#else
#include <ucontext.h>

namespace tf::emulator {

void* fiber_new(char* bottom, size_t bytes, void (*entry)()) {
  auto* context = reinterpret_cast<ucontext_t*>(bottom);  // it lives below its own stack
  getcontext(context);
  context->uc_stack.ss_sp = bottom + sizeof(ucontext_t);
  context->uc_stack.ss_size = bytes - sizeof(ucontext_t);
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}

void fiber_switch(void** from, void* to) {
  ucontext_t here;  // on the stack that is being left: it stays where it is until someone comes back
  *from = &here;
  swapcontext(&here, static_cast<ucontext_t*>(to));
}

}  // namespace tf::emulator

#endif
