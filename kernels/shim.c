/* A library whose RegisterCustomOps jumps to an address that is written into it after loading: what graphopt.kernels.trampoline writes
   byte by byte on Linux, for systems where that is not done. Nothing here depends on onnxruntime's headers or on operators. */
#include <stddef.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

typedef void *(*register_function)(void *options, const void *base);

EXPORT void *RegisterCustomOps__slot;

EXPORT void *RegisterCustomOps(void *options, const void *base) {
    return RegisterCustomOps__slot ? ((register_function)RegisterCustomOps__slot)(options, base) : NULL;
}
