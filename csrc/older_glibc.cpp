// Lets a library that was built on a new system run on older ones (glibc 2.27, older than torch's wheels need): symbols
// that would require a newer glibc are defined here instead, hidden from other libraries.
#include <features.h>

#ifdef __GLIBC__
extern "C" {
// libstdc++ reads it (glibc 2.32) to decide whether reference counts need atomic instructions. Here: always.
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;

#ifdef __x86_64__
// Since glibc 2.29 exp and log of doubles have a second version, which does not set errno. The first computes the same
// values.
double first_exp(double);
double first_log(double);
__asm__(".symver first_exp,exp@GLIBC_2.2.5");
__asm__(".symver first_log,log@GLIBC_2.2.5");
// C++ knows them by other names: otherwise the compiler takes them for its built-in functions, which are never hidden.
__attribute__((visibility("hidden"))) double hidden_exp(double) __asm__("exp");
__attribute__((visibility("hidden"))) double hidden_log(double) __asm__("log");
double hidden_exp(double x) { return first_exp(x); }
double hidden_log(double x) { return first_log(x); }
#endif
}
#endif
