// The kernel: one bin of every stream, a block a stream, the whole step in one launch.

// The rest of a stream's record; its covariance is there already. Returns whether the answer is
// beyond what is believable.
__device__ bool answer(const Arguments& g, Room& s, Window& win, const State& now, real* out) {
    features(g, now, out);
    if (RECURRENT) recur(g, s.answer, win, int(now.age) < LAGS ? int(now.age) : LAGS, out);
    if (D) decode(g, s.answer, s.sums, out);
    Channels c = observed(g, s.weights);
    const real* z = now.z + now.age * n;
    double odd = 0;
    // written so that what is not a number is beyond
    EACH(i, n) odd += fabs(z[i] - g.latent_centre[i]) <= g.latent_reach[i] ? 0 : 1;
    EACH(i, N) {
        real mean = out[RATES + i] = expected(c, i, z);
        odd += fabs(mean) <= g.bound_counts[i] ? 0 : 1;
    }
    EACH(k, D) odd += fabs(out[MEAN + k] - g.decode_centre[k]) <= g.decode_reach[k] ? 0 : 1;
    return sum(odd, s.sums) > 0;
}

__device__ void step_of(const Arguments& g, Room& s, Window& win, long long b) {
    State old = state_in(g.before, g.sources[b]), now = state_in(g.after, g.targets[b]);
    real* out = g.out + b * RECORD;
    int* said = g.said + b * 5;
    bool restarted = lost(g, s, old), predicts = g.predicts;
    if (restarted) old = state_in(g.initial, 0);
    bool moves = old.age == H, kept = false;
    if (moves && !predicts) kept = absorb(g, s, win, old, now);
    sync();
    if (!kept) {
        // a window that stays keeps its arrival cost. Else it is centred on the current trajectory, with
        // half of what was known beyond the prior where a bin is only taken in
        real share = predicts ? real(0.5) : real(0);
        EACH(i, n) now.mean[i] = moves ? old.z[n + i] : old.mean[i];
        EACH(e, n * n) {
            real prior = g.prior_precision[e], known = old.precision[e];
            now.precision[e] = !moves ? known : share > 0 ? prior + share * (known - prior) : prior;
        }
    }
    int status = take_in(g, s, old, now, b, moves, out, said), iterations = 0, newest = int(now.age);
    if (predicts) {
        EACH(e, n * n) out[COVARIANCE + e] = nan("");
    } else {
        int limit = int(g.limits[b]);
        Solve at = solve(g, s, win, now, limit < g.iterations ? limit : g.iterations);
        bool broken = at.status == NOT_FINITE, good = at.good && !broken;
        iterations = at.iterations;
        int ended = at.status != RUNNING ? at.status : iterations < g.iterations ? STOPPED : ITERATION_LIMIT;
        if (status == RUNNING) status = ended;
        if (!broken) {  // else the prediction stays, rather than spreading what is not finite
            EACH(e, (H + 1) * n) now.z[e] = win.z[at.slot][e];
            EACH(e, H * m) now.u[e] = win.u[at.slot][e];
        }
        if (good && STUDENT) {
            // covariances are stated with another curvature of the inputs than the solver's
            sync();
            EACH(t, H) win.share[t] = weight<true>(g, s.weights, now.u + t * m);
            double none = 0;
            good = backward(s.weights, win, s.stage, 0, none) &&
                   initial_step(win, s.stage, s.inverse, s.sums, 0, none);
        }
        if (good) covariance(win, s.stage, s.inverse, newest);
        sync();
        double odd = 0;
        if (good) EACH(i, n) odd += s.stage.V[i * n4 + i] > 0 ? 0 : 1;
        good = good && sum(odd, s.sums) == 0;
        // of a solve that broke down nothing is known but what was known before any bin came
        EACH(e, n * n) out[COVARIANCE + e] = good ? s.stage.V[e / n * n4 + e % n] : g.prior_covariance[e];
    }
    sync();
    bool beyond = answer(g, s, win, now, out);
    if (threadIdx.x == 0) {
        said[0] = iterations, said[1] = status, said[4] = restarted;
        said[3] = said[3] || beyond;
    }
    sync();
}

// Sizes in bytes: of a block's shared memory, and of its part of global memory.
extern "C" __device__ const long long sizes[2] = {sizeof(Room), sizeof(Window)};

// Small blocks share a multiprocessor, four at 128 registers a thread, so that one computes while
// another waits; of large ones there are few, and rows stay in registers.
constexpr int TOGETHER = IN_SHARED || THREADS > 128 ? 1 : 4;

extern "C" __global__ void __launch_bounds__(THREADS, TOGETHER) horizon_step(const Arguments g) {
    Room& s = *reinterpret_cast<Room*>(dynamic_memory());
    Window& win = *reinterpret_cast<Window*>(IN_SHARED ? s.window : g.windows + blockIdx.x * sizeof(Window));
    load_weights(g, s.weights);
    for (long long b = blockIdx.x; b < g.streams; b += gridDim.x) step_of(g, s, win, b);
}
