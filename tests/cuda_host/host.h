// Runs a CUDA kernel on the CPU, for tests: the threads of a block are fibres that run one after the
// other, each up to its next barrier, in an order that is chosen. What one thread writes and another
// reads without a barrier between them changes with the order, so two orders must give the same bits.

#include <csetjmp>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __align__(x)
#define __launch_bounds__(...)

using std::exp, std::fabs, std::fmax, std::fmin, std::log, std::log1p, std::nan, std::sqrt;
inline double rsqrt(double x) { return 1 / std::sqrt(x); }

struct Index { int x; };
static Index threadIdx, blockIdx, gridDim;
static std::vector<char> block_memory;

struct Barrier { int members = 0, arrived = 0; long round = 0; };
struct Fibre { ucontext_t first; jmp_buf at; std::vector<char> stack; bool begun = false, ended = false; };

static Fibre* fibres;
static jmp_buf scheduler;
static Barrier whole, teams[16], warps[32];
static long progress;

static void wait_at(Barrier& barrier, int members) {
    long round = barrier.round;
    if (++barrier.arrived == members) barrier.arrived = 0, barrier.round++, progress++;
    do  // the last one too, so that every part is run in the same order
        if (!_setjmp(fibres[threadIdx.x].at)) _longjmp(scheduler, 1);
    while (barrier.round == round);
}

inline void __syncthreads() { wait_at(whole, THREADS); }
inline void __syncwarp() { wait_at(warps[threadIdx.x / 32], 32); }
inline void part_sync(int name, int members) { wait_at(teams[name], members); }
inline void copy_16(void* to, const void* from) { std::memcpy(to, from, 16); }
inline void fetch_done() {}

static double exchanged[32][32];
inline double shuffle(double x, int from) {
    int warp = threadIdx.x / 32;
    exchanged[warp][threadIdx.x % 32] = x;
    __syncwarp();
    double found = exchanged[warp][from];
    __syncwarp();
    return found;
}
inline double __shfl_sync(unsigned, double x, int lane) { return shuffle(x, lane); }
inline double __shfl_xor_sync(unsigned, double x, int bits) { return shuffle(x, threadIdx.x % 32 ^ bits); }
inline char* dynamic_memory() {
    char* start = block_memory.data();
    return start + (-reinterpret_cast<unsigned long>(start) & 31);
}
