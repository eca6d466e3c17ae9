/* A program with onnxruntime and graphopt's library, and no Python: HOST onnxruntime.so model.onnx library.so ADDED
   Runs a toy model on 0, 1, ... 99 and checks that y = x + ADDED. Calls onnxruntime by slot numbers, so that no header is needed. */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

static void **api;

static void check(void *status) {
    if (status) {
        printf("%s\n", ((const char *(*)(void *))api[2])(status));
        exit(3);
    }
}

int main(int argc, char **argv) {
    void *runtime = dlopen(argv[1], RTLD_NOW);
    if (!runtime || argc < 5) {
        puts(dlerror());
        return 2;
    }
    void **base = ((void **(*)(void))dlsym(runtime, "OrtGetApiBase"))();
    api = ((void **(*)(uint32_t))base[0])(17);
    void *env, *options, *session, *memory, *input, *output = NULL;
    check(((void *(*)(int, const char *, void **))api[3])(4, "host", &env));
    check(((void *(*)(void **))api[10])(&options));
    check(((void *(*)(void *, const char *))api[228])(options, argv[3]));
    check(((void *(*)(void *, const char *, void *, void **))api[7])(env, argv[2], options, &session));
    check(((void *(*)(int, int, void **))api[69])(0, 0, &memory));
    float x[100], *y;
    for (int i = 0; i < 100; i++) x[i] = (float)i;
    int64_t shape[1] = {100};
    check(((void *(*)(void *, void *, size_t, const int64_t *, size_t, int, void **))api[49])(memory, x, sizeof x, shape, 1, 1, &input));
    const char *in[] = {"t0"}, *out[] = {"y0"};
    check(((void *(*)(void *, void *, const char **, void **, size_t, const char **, size_t, void **))api[9])(session, NULL, in, &input, 1, out, 1, &output));
    check(((void *(*)(void *, void **))api[51])(output, (void **)&y));
    for (int i = 0; i < 100; i++)
        if (y[i] != x[i] + (float)atof(argv[4])) return 4;
    ((void (*)(void *))api[96])(input);
    ((void (*)(void *))api[96])(output);
    ((void (*)(void *))api[95])(session);
    ((void (*)(void *))api[100])(options);
    ((void (*)(void *))api[92])(env);
    puts("ok");
    return 0;
}
