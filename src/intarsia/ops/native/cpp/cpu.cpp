// What this processor can do. The plain library is asked, and the best one that was built is loaded.
#include "vec.h"
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {
#if defined(__x86_64__)

bool bit(unsigned word, int n) { return word >> n & 1; }

bool may_use_tiles() {
#if defined(__linux__)
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return false;
#endif
}

int level() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, 27) || !bit(c, 12)) return 0;  // OSXSAVE, FMA
    unsigned low, high;
    asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));  // the registers that the system keeps for us
    if ((low & 6) != 6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !bit(b, 5)) return 0;  // AVX2
    unsigned features = b, vnni = c, tiles = d;
    bool avx512 = bit(features, 16) && bit(features, 17) && bit(features, 30) && bit(features, 31);  // F DQ BW VL
    if ((low & 0xe6) != 0xe6 || !avx512) return 1;
    bool bf16 = __get_cpuid_count(7, 1, &a, &b, &c, &d) && bit(a, 5);
    bool amx = bit(tiles, 22) && bit(tiles, 24) && (low & 0x60000) == 0x60000;  // AMX-BF16, AMX-TILE
    if (!bf16 || !bit(vnni, 11)) return 2;
    return amx && may_use_tiles() ? 4 : 3;
}

#else
int level() { return 0; }
#endif
}  // namespace

// The index of the best level in build.LEVELS that runs here.
API int intarsia_level() { return level(); }

// What this library was built from.
API const char* intarsia_sources() { return INTARSIA_SOURCES; }
