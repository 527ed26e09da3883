// What the kernel asks of the machine beside the language; tests have a CPU's in place of it.

// A barrier of the block's first ``threads`` threads.
__device__ inline void part_sync(int name, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

// 16 bytes from global to shared memory, which are there after ``fetch_done`` and a barrier.
__device__ inline void copy_16(void* to, const void* from) {
    unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
}

__device__ inline void fetch_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ inline char* dynamic_memory() {
    extern __shared__ __align__(32) char memory[];
    return memory;
}
