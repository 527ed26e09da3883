// What one stream's window does before and after its solve: the letters and formulas are those of
// streaming.horizon and of the CPU kernel (window.py, iteration.py).

constexpr int RUNNING = 0, CONVERGED = 1, ITERATION_LIMIT = 2, STALLED = 3, NOT_FINITE = 4, STOPPED = 5;

struct alignas(32) Absorb {
    double S[n * LDS], P[n * n], AP[n * n], shift[n];
};

// What a block holds in shared memory.
struct alignas(32) Room {
    Weights weights;
    Vectors v;
    Inverse inverse;
    double sums[THREADS / 32];
    union alignas(32) {
        Stage stage;
        Absorb absorb;
        Answer answer;
    };
    alignas(32) char window[IN_SHARED ? sizeof(Window) : 32];
};

__device__ Channels observed(const Arguments& g, const Weights& w) {
    return {C_HERE ? w.C : g.C, g.b, g.limit, g.gain, g.floor, g.soft, C_HERE ? LDC : n};
}

// d = u' L u of the inputs of a bin, centred; L the prior's precision.
__device__ inline double energy(const Weights& w, const real* u) {
    double d = 0;
    for (int a = 0; a < m; a++) {
        double e = u[a] - w.centre[a];
        d += e * e * w.prior[a];
    }
    return d;
}

// What the curvature of -log p(u) is of L in a bin; STATED: by which covariances are stated.
template <bool STATED> __device__ inline real weight(const Arguments& g, const Weights& w, const real* u) {
    if (!STUDENT) return 1;
    double share = (g.nu + m) / (g.nu + energy(w, u));
    if (STATED) share = fmin(share, (g.nu - 2) / g.nu);
    return share;
}

// One step of the dynamics from v.x and v.u (set, without a barrier) into v.start.
__device__ void advance(const Arguments& g, const Weights& w, Vectors& v) {
    sync();
    EACH(i, n) {
        real moved = 0;
        for (int k = 0; k < n; k++) moved += w.Wz[i * n4 + k] * v.x[k];
        v.driven[i] = 0;
        for (int a = 0; a < m; a++) v.driven[i] += w.Wu[i * m4 + a] * v.u[a];
        v.f[i] = FAMILY ? gate(moved + g.bz[i]) : moved + v.driven[i];
        v.gated[i] = v.f[i] * v.x[i];
    }
    sync();
    EACH(i, n) {
        v.start[i] = v.f[i];
        if (!FAMILY) continue;
        real x = g.bh[i];
        for (int k = 0; k < n; k++) x += w.WhT[k * n4 + i] * v.gated[k];
        v.h[i] = candidate(x, v.driven[i]);
        v.start[i] = v.x[i] + v.f[i] * (v.h[i] - v.x[i]);
    }
    sync();
}

// Arrival mean and precision one bin later; false where they break down.
__device__ bool absorb(const Arguments& g, Room& s, Window& win, const State& old, State& now) {
    Absorb& b = s.absorb;
    const Weights& w = s.weights;
    Channels c = observed(g, w);
    EACH(i, n) s.v.x[i] = old.z[i];
    EACH(a, m) s.v.u[a] = old.u[a];
    advance(g, w, s.v);
    EACH(i, n) win.f[0][i] = s.v.f[i], win.h[0][i] = s.v.h[i];
    linearise(g, w, 1, old.z, old.u, win.f[0], win.h[0], win.blocks);
    score(g, c, 1, old.z, old.counts, old.mask, win.d[0], win.w[0]);
    curvature(c, 1, win.d[0], win.w[0], win.q, win.blocks);
    const real *B = win.blocks, *A = B + AT, *Q = B + n * LD + QT;
    EACH(e, n * n) {
        int i = e / n, j = e % n;
        s.inverse.S[i * LDS + j] = 0.5 * (double(old.precision[e]) + old.precision[j * n + i]);
    }
    EACH(i, n) {
        double total = 0;
        for (int j = 0; j < n; j++) total += A[i * LD + j] * (double(old.mean[j]) - old.z[j]);
        // R is diagonal, so R^-1 r = u - centre
        for (int a = 0; a < m; a++) total -= B[i * LD + a] * (double(old.u[a]) - w.centre[a]);
        b.shift[i] = total;
        s.inverse.S[i * LDS + n] = 0;
    }
    if (!invert(s.inverse)) return false;
    EACH(e, n * n) {
        int i = e / n, j = e % n;
        double total = 0;
        for (int k = 0; k < n; k++) total += A[i * LD + k] * s.inverse.S[k * LDS + j];
        b.AP[e] = total;
    }
    sync();
    double share = weight<true>(g, w, old.u), trace = 0;
    EACH(e, n * n) {
        int i = e / n, j = e % n;
        double total = 0;
        for (int k = 0; k < n; k++) total += b.AP[i * n + k] * A[j * LD + k];
        for (int a = 0; a < m; a++) total += double(B[i * LD + a]) * B[j * LD + a] / (share * w.prior[a]);
        b.P[e] = total;
        if (i == j) trace += total;
    }
    trace = sum(trace, s.sums);
    // a direction that dynamics and inputs both leave at zero variance would have no inverse
    EACH(e, n * n) {
        int i = e / n, j = e % n;
        s.inverse.S[i * LDS + j] = 0.5 * (b.P[e] + b.P[j * n + i]) + (i == j ? 1e-10 * trace / n : 0);
    }
    EACH(i, n) s.inverse.S[i * LDS + n] = b.shift[i];
    if (!invert(s.inverse)) return false;
    EACH(e, n * n) {
        int i = e / n, j = e % n;
        b.P[e] = 0.5 * (s.inverse.S[i * LDS + j] + s.inverse.S[j * LDS + i]) + Q[i * LD + j];
        now.precision[e] = b.P[e];
    }
    EACH(i, n) b.shift[i] = s.inverse.S[i * LDS + n] - win.q[i];
    sync();
    EACH(e, n * n) s.inverse.S[e / n * LDS + e % n] = b.P[e];
    EACH(i, n) s.inverse.S[i * LDS + n] = b.shift[i];
    if (!invert(s.inverse)) return false;
    EACH(i, n) now.mean[i] = old.z[n + i] + s.inverse.S[i * LDS + n];
    sync();
    return true;
}

// Whether the stream's state is not finite or astronomically far from all that was seen.
__device__ bool lost(const Arguments& g, Room& s, const State& old) {
    double odd = 0;
    // written so that what is not a number is lost
    EACH(e, (H + 2) * n) {
        real x = e < n ? old.mean[e] : old.z[e - n];
        odd += fabs(x - g.latent_centre[e % n]) <= g.latent_lost[e % n] ? 0 : 1;
    }
    EACH(e, H * m) odd += is_finite(old.u[e]) ? 0 : 1;
    return sum(odd, s.sums) > 0;
}

// Move what a full window holds, put the new bin in, and predict it; returns the bin's own status.
__device__ int take_in(
    const Arguments& g, Room& s, const State& old, State& now, long long b, bool moves, real* out, int* said
) {
    const Weights& w = s.weights;
    int shift = moves, newest = int(old.age) - shift, kept = H - shift;
    EACH(e, kept * m) now.u[e] = old.u[e + shift * m];
    EACH(e, kept * N) now.counts[e] = old.counts[e + shift * N], now.mask[e] = old.mask[e + shift * N];
    EACH(e, (kept + 1) * n) now.z[e] = old.z[e + shift * n];
    if (moves) {
        EACH(a, m) s.v.u[a] = now.u[kept * m + a] = w.centre[a];
        EACH(i, n) s.v.x[i] = old.z[H * n + i];
        EACH(i, N) now.counts[kept * N + i] = now.mask[kept * N + i] = 0;
        advance(g, w, s.v);
        EACH(i, n) now.z[H * n + i] = s.v.start[i];
    }
    sync();
    Channels c = observed(g, w);
    double gain = 0, spikes = 0, ignored = 0, used = 0, odd = 0;
    EACH(i, N) {
        real here = g.bins_mask[b * N + i], count = here > 0 ? g.bins_counts[b * N + i] : real(0);
        if (!is_finite(count)) here = count = 0, odd += 1;  // as if not observed, and reported
        else if (fabs(count) > g.bound_counts[i]) here = count = 0, ignored += 1;
        if (here > 0) used += 1;
        now.counts[newest * N + i] = count, now.mask[newest * N + i] = here;
        real mean = expected(c, i, now.z + (newest + 1) * n);
        double base = fmax(double(g.mean_rates[i]), 1e-9), rate = mean > real(1e-9) || mean != mean ? mean : real(1e-9);
        if (i < POISSON) gain += (count * (log(rate) - log(base)) - (rate - base)) * here;
        else {
            double error = count - mean, other = count - g.mean_rates[i];
            gain += 0.5 * g.precision[i] * (other * other - error * error) * here;
        }
        spikes += double(count) * here;
    }
    gain = sum(gain, s.sums), spikes = sum(spikes, s.sums), odd = sum(odd, s.sums);
    ignored = sum(ignored, s.sums), used = sum(used, s.sums);
    if (threadIdx.x == 0) {
        g.after.age[g.targets[b]] = newest + 1;
        out[BITS] = gain / 0.6931471805599453, out[BITS + 1] = spikes;
        said[2] = ignored, said[3] = ignored > 0 && used == 0;
    }
    now.age = newest + 1;
    sync();
    return odd > 0 ? NOT_FINITE : RUNNING;
}

struct Solve { double cost, damping; int status, iterations, slot; bool good; };

// J of slot ``at`` of the window, around the arrival cost of ``now``.
__device__ double cost_of(const Arguments& g, Room& s, Window& win, const State& now, int at) {
    const Weights& w = s.weights;
    const real *z = win.z[at], *u = win.u[at];
    double total = score(g, observed(g, w), H, z, now.counts, now.mask, win.d[at], win.w[at]);
    EACH(t, H) {
        double d = energy(w, u + t * m);
        total += STUDENT ? 0.5 * (g.nu + m) * log(1 + d / g.nu) : 0.5 * d;
    }
    EACH(i, n) {
        double row = 0;
        for (int j = 0; j < n; j++) row += now.precision[i * n + j] * (double(z[j]) - now.mean[j]);
        total += 0.5 * (double(z[i]) - now.mean[i]) * row;
    }
    return sum(total, s.sums) + H * g.constant;
}

// The LQR problem around the current trajectory. Returns whether its gradient is finite.
__device__ bool quadratic_model(const Arguments& g, Room& s, Window& win, const State& now, int at) {
    const Weights& w = s.weights;
    linearise(g, w, H, win.z[at], win.u[at], win.f[at], win.h[at], win.blocks);
    curvature(observed(g, w), H, win.d[at], win.w[at], win.q + n, win.blocks);
    double odd = 0;
    EACH(e, n * n) win.blocks[e / n * LD + QT + e % n] = now.precision[e];
    EACH(i, n) {
        double total = 0;
        for (int j = 0; j < n; j++) total += now.precision[i * n + j] * (double(win.z[at][j]) - now.mean[j]);
        win.q[i] = total;
        odd += is_finite(total) ? 0 : 1;
    }
    EACH(t, H) {
        const real* u = win.u[at] + t * m;
        win.share[t] = weight<false>(g, w, u);
        for (int a = 0; a < m; a++) win.r[t * m + a] = (u[a] - w.centre[a]) * w.prior[a] * win.share[t];
    }
    EACH(e, H * n) odd += is_finite(win.q[n + e]) ? 0 : 1;
    return sum(odd, s.sums) == 0;
}

// Backtrack from the full step; takes the first that lowers J enough. Returns whether one did.
__device__ bool search(const Arguments& g, Room& s, Window& win, const State& now, Solve& at, double decrease) {
    int old = at.slot, other = 1 - old;
    // What rounding of J can hide. In float32 the terms are rounded apart and their sum is double: the
    // slack of a rounded sum would take steps that float64 does not take.
    double slack = EPSILON * fabs(at.cost) * (sizeof(real) == 4 ? 1 / sqrt(double(H) * N) : 10);
    real alpha = 1;
    for (int k = 0; k <= g.backtracks; k++, alpha *= real(0.5)) {
        sync();
        EACH(i, n) s.v.x[i] = win.z[old][i] + alpha * win.dz[i];
        roll_out<true>(
            g, H, win.u[old], {win.z[old], win.K, win.k, alpha}, s.v, win.z[other], win.u[other],
            win.f[other], win.h[other]
        );
        double trial = cost_of(g, s, win, now, other);
        if (trial <= at.cost - g.armijo * alpha * (2 - alpha) * decrease + slack) {
            at.cost = trial, at.slot = other;
            return true;
        }
    }
    return false;
}

// At most ``limit`` iterations from the inputs of ``now`` and the first state of its trajectory.
__device__ Solve solve(const Arguments& g, Room& s, Window& win, const State& now, int limit) {
    EACH(i, n) s.v.x[i] = now.z[i];
    roll_out<false>(g, H, now.u, {nullptr, nullptr, nullptr, 0}, s.v, win.z[0], win.u[0], win.f[0], win.h[0]);
    Solve at = {0, 0, RUNNING, 0, 0, false};
    at.cost = cost_of(g, s, win, now, 0);
    if (!is_finite(at.cost)) at.status = NOT_FINITE;
    while (at.status == RUNNING && at.iterations < limit) {
        at.iterations++;
        bool sound = quadratic_model(g, s, win, now, at.slot), converged = false, taken = false;
        double decrease = 0;
        at.good = backward(s.weights, win, s.stage, at.damping, decrease) &&
                  initial_step(win, s.stage, s.inverse, s.sums, at.damping, decrease);
        if (at.good) {
            converged = decrease <= g.tolerance * (1 + fabs(at.cost));
            taken = search(g, s, win, now, at, decrease);
        }
        if (converged) at.status = CONVERGED;
        if (taken) at.damping = 0;
        else if (!converged) {
            at.damping = fmax(10 * at.damping, g.damping_min);
            if (!sound) at.status = NOT_FINITE;
            else if (at.damping > g.damping_max) at.status = STALLED;
        }
    }
    return at;
}
