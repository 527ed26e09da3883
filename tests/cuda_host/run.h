// The launch: every block in turn. ``order``: 0 from the first thread on, 1 from the last.

static const Arguments* launched;
static void begin_fibre() {
    horizon_step(*launched);
    fibres[threadIdx.x].ended = true;
    progress++;
    _longjmp(scheduler, 1);
}

extern "C" int launch(const Arguments* given, int blocks, int order) {
    std::vector<Fibre> made(THREADS);
    fibres = made.data(), launched = given, gridDim.x = blocks;
    for (Fibre& f : made) f.stack.resize(256 << 10);
    for (int block = 0; block < blocks; block++) {
        // what is read before it is written is no number
        block_memory.assign(sizeof(Room) + 64, char(0xff));
        for (Fibre& f : made) f.begun = f.ended = false;
        for (int left = THREADS; left;) {
            long before = progress;
            left = 0;
            for (int k = 0; k < THREADS; k++) {
                int i = order ? THREADS - 1 - k : k;
                Fibre& f = made[i];
                if (f.ended) continue;
                left++;
                if (_setjmp(scheduler)) continue;
                threadIdx.x = i, blockIdx.x = block;
                if (f.begun) _longjmp(f.at, 1);
                f.begun = true;
                getcontext(&f.first);
                f.first.uc_stack.ss_sp = f.stack.data(), f.first.uc_stack.ss_size = f.stack.size();
                makecontext(&f.first, begin_fibre, 0);
                setcontext(&f.first);
            }
            if (left && progress == before) return 1;  // threads wait for each other
        }
    }
    return 0;
}
