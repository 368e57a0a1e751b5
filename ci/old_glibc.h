// Included first where the library of a wheel is compiled: what it calls of the C library by the oldest version that this has
// kept, so that a wheel made on a new system loads on older ones. glibc 2.34 renamed what came from libpthread and libdl, which
// older systems load with Python.
#if defined(__x86_64__)
#define OLDEST "GLIBC_2.2.5"
#define OLDEST_WITH_AFFINITY "GLIBC_2.3.4"
#else
#define OLDEST "GLIBC_2.17"
#define OLDEST_WITH_AFFINITY OLDEST
#endif
__asm__(".symver dlsym,dlsym@" OLDEST);
__asm__(".symver pthread_create,pthread_create@" OLDEST);
__asm__(".symver pthread_detach,pthread_detach@" OLDEST);
__asm__(".symver pthread_sigmask,pthread_sigmask@" OLDEST);
__asm__(".symver pthread_setaffinity_np,pthread_setaffinity_np@" OLDEST_WITH_AFFINITY);
