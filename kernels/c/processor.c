/* The x86-64 level of this processor, 1 to 4; 0 on other kinds. */
int weft_level(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("x86-64-v4")) return 4;
    if (__builtin_cpu_supports("x86-64-v3")) return 3;
    return 1;
#else
    return 0;
#endif
}

/* Which sources this was built from: setup.py's digest of them, or 0. */
#ifndef WEFT_SOURCES
#define WEFT_SOURCES 0
#endif
unsigned long long weft_sources(void) { return WEFT_SOURCES; }
