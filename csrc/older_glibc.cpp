// A library built on a new system runs on older ones (glibc 2.27, before torch's own wheels): what would ask for a newer
// glibc is resolved in here instead. The symbols are hidden, nobody else sees them.
#include <features.h>

#ifdef __GLIBC__
extern "C" {
// libstdc++ asks it (glibc 2.32) whether reference counts may do without atomic instructions. Here: never.
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;

#ifdef __x86_64__
// exp and log in double precision have a second version since 2.29, which leaves errno alone; the first computes the same.
double first_exp(double);
double first_log(double);
__asm__(".symver first_exp,exp@GLIBC_2.2.5");
__asm__(".symver first_log,log@GLIBC_2.2.5");
// Under other names in C++, or the compiler takes them for its built-in functions, which are never hidden.
__attribute__((visibility("hidden"))) double hidden_exp(double) __asm__("exp");
__attribute__((visibility("hidden"))) double hidden_log(double) __asm__("log");
double hidden_exp(double x) { return first_exp(x); }
double hidden_log(double x) { return first_log(x); }
#endif
}
#endif
