// The answer: features, kinematics, rates; the letters and formulas are those of model.readout.

constexpr int BINS = most(RESIDUALS, RECURRENT ? LAGS : 0), LEFT = (LAGS + 1) * n, HELD = LEFT + RESIDUALS * N;
// Places in a stream's record of numbers.
constexpr int COVARIANCE = FEATURES, RATES = COVARIANCE + n * n, MEAN = RATES + N, STD = MEAN + D;

struct alignas(32) Answer {
    real J[n4], h[most(RECURRENT, 1)], next[most(RECURRENT, 1)], unit[most(HIDDEN, 1)], state[n4];
    double mean[most(D, 1)];
};

// What the readout reads: latents, unexplained spikes, and the bins held and their counts.
__device__ void features(const Arguments& g, const State& now, real* out) {
    int newest = int(now.age);
    EACH(e, LEFT) {
        int slot = newest - e / n;
        out[e] = now.z[(slot > 0 ? slot : 0) * n + e % n];
    }
    Channels c = {g.read_C, g.read_b, g.limit, g.read_gain, g.floor, g.soft, n};
    if (RECURRENT && threadIdx.x == 0) out[HELD] = newest < LAGS ? newest : LAGS;
    EACH(e, BINS * N) {
        int k = e / N, i = e % N, slot = newest - k;
        real left = 0, filled = 0;
        if (slot >= 1) {
            real mean = expected(c, i, now.z + slot * n);
            real seen = now.counts[(slot - 1) * N + i], there = now.mask[(slot - 1) * N + i] * g.believed[i];
            left = there * (seen - mean), filled = there > 0 ? seen : mean;
        }
        if (k < RESIDUALS) out[LEFT + e] = left;
        if (RECURRENT && k < LAGS) out[HELD + 1 + e] = filled;
    }
    sync();
}

// The recurrent layer's state after the bins held, into a.h.
__device__ void recur(const Arguments& g, Answer& a, Window& win, int held, const real* out) {
    constexpr int G = RECURRENT, G1 = most(RECURRENT, 1);
    EACH(i, G) {
        real x = g.a[i];
        for (int j = 0; j < n; j++) x += g.A[i * n + j] * out[LAGS * n + j];
        a.h[i] = 2 / (1 + exp(-2 * x)) - 1;
    }
    EACH(e, held * 3 * G) {
        int k = e / (3 * G1), i = e % (3 * G1);
        const real* x = out + HELD + 1 + k * N;
        real total = g.p[i];
        for (int j = 0; j < N; j++) total += g.P[j * 3 * G + i] * x[j];
        win.given[e] = total;
    }
    for (int k = held - 1; k >= 0; k--) {
        sync();
        EACH(i, G) {
            real kept[3] = {g.g[i], g.g[G + i], g.g[2 * G + i]};
            for (int j = 0; j < G; j++)
                for (int r = 0; r < 3; r++) kept[r] += g.G[j * 3 * G + r * G + i] * a.h[j];
            const real* given = win.given + k * 3 * G + i;
            real reset = gate(given[0] + kept[0]), stay = gate(given[G] + kept[1]);
            real fresh = 2 * gate(2 * (given[2 * G] + reset * kept[2])) - 1;
            a.next[i] = (1 - stay) * fresh + stay * a.h[i];
        }
        sync();
        EACH(i, G) a.h[i] = a.next[i];
    }
    sync();
}

// Mean and deviation of the kinematics.
__device__ void decode(const Arguments& g, Answer& a, double* room, real* out) {
    EACH(i, HIDDEN) {
        real x = g.c[i];
        for (int j = 0; j < DIRECT; j++) x += g.Ut[j * HIDDEN + i] * out[j];
        a.unit[i] = x <= 0 ? real(0) : x;  // what is not a number stays that
    }
    sync();
    double off = 0;
    for (int k = 0; k < D; k++) {
        double total = 0;
        EACH(j, DIRECT) total += double(g.W[k * DIRECT + j]) * out[j];
        EACH(i, HIDDEN) total += double(g.O[k * HIDDEN + i]) * a.unit[i];
        EACH(i, RECURRENT) total += double(g.Cr[k * RECURRENT + i]) * a.h[i];
        total = sum(total, room) + g.offset[k];
        if (threadIdx.x == 0) a.mean[k] = total, out[MEAN + k] = total;
        double x = (total - g.decode_mean[k]) / g.spread[k];
        off += x * x / D;
    }
    for (int k = 0; k < D; k++) {
        sync();
        EACH(i, n) {
            real x = g.W[k * DIRECT + i];
            for (int b = 0; b < HIDDEN; b++)
                if (a.unit[b] != 0) x += g.O[k * HIDDEN + b] * g.U[b * n + i];
            a.J[i] = x;
        }
        sync();
        double latent = 0;
        EACH(e, n * n) latent += double(a.J[e / n]) * out[COVARIANCE + e] * a.J[e % n];
        latent = sum(latent, room);
        if (threadIdx.x == 0)
            out[STD + k] = sqrt(g.stated_gain[k] * latent + g.variance[k] + g.kappa[k] * off);
    }
    sync();
}
