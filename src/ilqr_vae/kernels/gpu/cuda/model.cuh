// Dynamics and observations: rollouts, Jacobians, the cost of what is observed and its curvature.
// The families, letters and formulas are those of the CPU kernels (dynamics.py, observations.py).

constexpr int LINEAR = 0, MGU2 = 1, SOFT = 2, OUTSIDE = 4;
constexpr bool OUT = FAMILY & OUTSIDE;
// where C is too large for shared memory it is read where it lies
constexpr bool C_HERE = sizeof(real) * N * LDC <= 64 * 1024;

// What stays in shared memory for the whole launch.
struct alignas(32) Weights {
    real Wz[n * n4];   // U_f, or A of linear dynamics
    real WhT[n * n4];  // the transpose of U_h
    real Wu[n * m4];
    real C[C_HERE ? N * LDC : 4];
    real prior[m4], centre[m4];
};

// A step's vectors.
struct alignas(32) Vectors {
    real x[n4], away[n4], gated[n4], driven[n4], u[m4], f[n4], h[n4], start[n4];
};

__device__ void load_weights(const Arguments& g, Weights& w) {
    EACH(e, n * n) {
        int i = e / n, j = e % n;
        w.Wz[i * n4 + j] = g.Wz[e];
        w.WhT[j * n4 + i] = FAMILY ? g.Wh[e] : 0;
    }
    EACH(e, n * m) w.Wu[e / m * m4 + e % m] = g.Wu[e];
    if (C_HERE) EACH(e, N * n) w.C[e / n * LDC + e % n] = g.C[e];
    EACH(a, m) w.prior[a] = g.weight[a], w.centre[a] = g.centre[a];
    sync();
}

__device__ inline real gate(real x) { return 1 / (1 + exp(-x)); }

// The candidate of an MGU2 from U_h (f . z) + b_h, and what the input adds.
__device__ inline real candidate(real x, real driven) {
    if (!OUT) x += driven;
    real y = FAMILY & SOFT ? real(0.5) * (x + sqrt(x * x + 4)) - 1 : 1 - 2 / (1 + exp(2 * x));
    return OUT ? y + driven : y;
}

// Slope of the activation where its value is y.
__device__ inline real steepness(real y) {
    if (!(FAMILY & SOFT)) return 1 - y * y;
    real square = (y + 1) * (y + 1);
    return square / (square + 1);
}

// A law of feedback: u = ub + alpha k + K (z - zb). K (T, m, n4), k (T, m).
struct Law { const real *zb, *K, *k; real alpha; };

// z (T+1, n), u, f and h from the state v.x on, by one team; f and h of an MGU2 alone. Ends with a
// barrier of the block.
template <bool CLOSED>
__device__ void roll_out(
    const Arguments& g, int T, const real* ub, Law law, Vectors& v, real* z, real* u, real* f, real* h
) {
    sync();
    if (threadIdx.x < TEAM) {
        int i = threadIdx.x < n ? threadIdx.x : n - 1, a = threadIdx.x < m ? threadIdx.x : m - 1;
        bool mine = threadIdx.x < n, drives = threadIdx.x < m;
        real wz[n], wh[FAMILY ? n : 1], wu[m], gain[CLOSED ? n : 1];
        load_row(wz, g.Wz + i * n);
        load_row(wu, g.Wu + i * m);
        real bz = 0, bh = 0, x = v.x[i], pushed = 0;
        if (FAMILY) {
            load_row(wh, g.Wh + i * n);
            bz = g.bz[i], bh = g.bh[i];
        }
        if (mine) z[i] = x;
        if (CLOSED && mine) v.away[i] = x - law.zb[i];
        if (CLOSED) load_row(gain, law.K + a * n4);
        team_sync();
        for (int t = 0; t < T; t++) {
            if (drives) {
                real given = ub[t * m + a];
                if (CLOSED) given += law.alpha * law.k[t * m + a] + dot(gain, v.away);
                v.u[a] = u[t * m + a] = given;
            }
            // the next step's law is fetched while this one's arithmetic is waited for
            if (CLOSED && t + 1 < T) load_row(gain, law.K + ((t + 1) * m + a) * n4);
            real moved = dot(wz, v.x), open = 0;
            if (FAMILY) {
                open = gate(moved + bz);
                if (mine) v.gated[i] = open * x;
            }
            team_sync();
            pushed = dot(wu, v.u);
            if (FAMILY) {
                real y = candidate(dot(wh, v.gated) + bh, pushed);
                if (mine) f[t * n + i] = open, h[t * n + i] = y;
                x += open * (y - x);
            } else x = moved + pushed;
            if (mine) {
                z[(t + 1) * n + i] = v.x[i] = x;
                if (CLOSED) v.away[i] = x - law.zb[(t + 1) * n + i];
            }
            team_sync();
        }
    }
    sync();
}

// Jacobians into blocks [B | A | .] of T steps along a rollout that left f and h.
__device__ void linearise(
    const Arguments& g, const Weights& w, int T, const real* z, const real* u, const real* f,
    const real* h, real* blocks
) {
    sync();
    constexpr int SQUARES = ROWS4 * ROWS4;
    EACH(e, T * SQUARES) {
        int t = e / SQUARES, i0 = e % SQUARES % ROWS4 * 4, j0 = e % SQUARES / ROWS4 * 4;
        real s[4][4] = {};
        real* out = blocks + t * n * LD + AT;
        if (FAMILY) {
            for (int k = 0; k < n; k++) {
                real open = f[t * n + k];
                real scale = z[t * n + k] * (open * (1 - open));
                Four x = *(const Four*)(w.WhT + k * n4 + i0), y = *(const Four*)(w.Wz + k * n4 + j0);
#pragma unroll
                for (int a = 0; a < 4; a++)
#pragma unroll
                    for (int b = 0; b < 4; b++) s[a][b] += x.v[a] * scale * y.v[b];
            }
        }
        for (int a = 0; a < 4 && i0 + a < n; a++) {
            int i = i0 + a;
            real open = 0, through = 1, steep = 0;
            if (FAMILY) {
                open = f[t * n + i];
                real y = h[t * n + i], driven = 0;
                if (OUT)
                    for (int c = 0; c < m; c++) driven += w.Wu[i * m4 + c] * u[t * m + c];
                through = (y - z[t * n + i]) * (open * (1 - open));
                steep = open * steepness(y - driven);
            }
            for (int b = 0; b < 4 && j0 + b < n; b++) {
                int j = j0 + b;
                real value = through * w.Wz[i * n4 + j];
                if (FAMILY) {
                    value += steep * (w.WhT[j * n4 + i] * f[t * n + j] + s[a][b]);
                    if (i == j) value += 1 - open;
                }
                out[i * LD + j] = value;
            }
            if (j0 == 0) {
                real entering = FAMILY ? (OUT ? open : steep) : real(1);
                for (int c = 0; c < m; c++) out[i * LD - AT + c] = entering * w.Wu[i * m4 + c];
            }
        }
    }
    sync();
}

// One group of channels, as observed or as the readout has them.
struct Channels { const real *C, *b, *limit, *gain, *floor, *soft; int ld; };

struct Rate { real rate, slope, second, log, ratio, bend; };

// The rate gain (link(a) + floor), its log, and the first two derivatives of both in a.
__device__ inline Rate rate_of(const Channels& c, int i, real a) {
    real link, slope, second, log_, ratio, bend;
    if (c.soft[i] > 0) {
        real rest = 1 / (1 + exp(a));
        slope = 1 / (1 + exp(-a));
        link = log1p(exp(-fabs(a))) + (a > 0 ? a : 0);
        second = slope * rest;
        real tail = a < -15 ? exp(a) : real(0);
        log_ = a < -15 ? a - real(0.5) * tail : log(link);
        ratio = a < -15 ? 1 - real(0.5) * tail : slope / link;
        bend = -ratio * (ratio - rest > 0 ? ratio - rest : real(0));
    } else {
        real over = a > c.limit[i] ? a - c.limit[i] : real(0);
        slope = exp(a - over);
        link = slope * (1 + over);
        second = over > 0 ? real(0) : slope;
        log_ = a - over + log1p(over);
        ratio = 1 / (1 + over);
        bend = over > 0 ? -ratio * ratio : real(0);
    }
    if (c.floor[i] > 0) {
        link += c.floor[i];
        log_ = log(link), ratio = slope / link;
        bend = second / link - ratio * ratio;
    }
    real gain = c.gain[i];
    return {gain * link, gain * slope, gain * second, log_ + log(gain), ratio, bend};
}

__device__ inline real affine(const Channels& c, int i, const real* z) {
    real s[4] = {c.b[i], 0, 0, 0};
    const real* row = c.C + i * c.ld;
#pragma unroll
    for (int k = 0; k < n; k++) s[k % 4] += row[k] * z[k];
    return (s[0] + s[1]) + (s[2] + s[3]);
}

// E[o_i | z].
__device__ inline real expected(const Channels& c, int i, const real* z) {
    real a = affine(c, i, z);
    if (i >= POISSON) return a;
    if (LINKED) return rate_of(c, i, a).rate;
    real over = a > c.limit[i] ? a - c.limit[i] : real(0);
    return exp(a - over) * (1 + over);
}

// This thread's part of -sum log p (without log y!) of T bins at the states z[1:], and slopes d and
// curvatures w in each channel's affine readout (T, N4).
__device__ double score(
    const Arguments& g, const Channels& c, int T, const real* z, const real* values, const real* mask,
    real* d, real* w
) {
    double total = 0;
    EACH(e, T * N) {
        int t = e / N, i = e % N;
        real a = affine(c, i, z + (t + 1) * n), y = values[e], seen = mask[e], slope, curve;
        if (i >= POISSON) {
            real off = a - y, precision = g.precision[i];
            total += real(0.5) * (off * off * precision - log(precision) + real(1.8378770664093453)) * seen;
            slope = off * precision, curve = precision;
        } else if (LINKED) {
            Rate r = rate_of(c, i, a);
            total += (r.rate - y * r.log) * seen;
            slope = r.slope - y * r.ratio;
            // Fisher information under an exp link, else what is positive
            real exact = r.second - y * r.bend;
            curve = c.soft[i] > 0 ? (exact > 0 ? exact : real(0)) : r.slope * r.ratio;
        } else {
            real over = a > c.limit[i] ? a - c.limit[i] : real(0), stretch = 1 + over;
            real base = exp(a - over);
            total += (base * stretch - y * (a - over + (over > 0 ? log1p(over) : real(0)))) * seen;
            slope = base - y / stretch, curve = base / stretch;
        }
        d[t * N4 + i] = slope * seen, w[t * N4 + i] = curve * seen;
    }
    return total;
}

// q = C' d (T, n), and C' diag(w) C into the Q of blocks 1 to T.
__device__ void curvature(const Channels& c, int T, const real* d, const real* w, real* q, real* blocks) {
    sync();
    constexpr int PAIRS = ROWS4 * (ROWS4 + 1) / 2;
    EACH(e, T * PAIRS) {
        int t = e / PAIRS, pair = e % PAIRS, a = 0;
        while (pair >= ROWS4 - a) pair -= ROWS4 - a++;
        int i0 = 4 * a, j0 = i0 + 4 * pair;
        real s[4][4] = {};
        const real* weight = w + t * N4;
        bool whole = n % 4 == 0 || j0 + 4 <= n;  // of rows without pads nothing beyond is read
        for (int k = 0; k < N; k++) {
            const real* row = c.C + k * c.ld;
            real scale = weight[k], x[4], y[4];
            if (C_HERE) {
                Four one = *(const Four*)(row + i0), two = *(const Four*)(row + j0);
#pragma unroll
                for (int b = 0; b < 4; b++) x[b] = one.v[b] * scale, y[b] = two.v[b];
            } else {
#pragma unroll
                for (int b = 0; b < 4; b++) {
                    x[b] = row[i0 + b < n ? i0 + b : 0] * scale;
                    y[b] = row[whole || j0 + b < n ? j0 + b : 0];
                }
            }
#pragma unroll
            for (int b = 0; b < 4; b++)
#pragma unroll
                for (int f = 0; f < 4; f++) s[b][f] += x[b] * y[f];
        }
        real* Q = blocks + (t + 1) * n * LD + QT;
        for (int b = 0; b < 4; b++)
            for (int f = 0; f < 4; f++) {
                int i = i0 + b, j = j0 + f;
                if (i <= j && j < n) Q[i * LD + j] = Q[j * LD + i] = s[b][f];
            }
    }
    EACH_LAST(e, T * n) {
        int t = e / n, i = e % n;
        double total = 0;
        for (int k0 = 0; k0 < N; k0 += 8) {
            real part = 0;
            for (int k = k0; k < N && k < k0 + 8; k++) part += c.C[k * c.ld + i] * d[t * N4 + k];
            total += part;
        }
        q[t * n + i] = total;
    }
    sync();
}

// A stream's state in its row.
struct State { long long age; real *mean, *precision, *z, *u, *counts, *mask; };

__device__ State state_in(const Streams& s, long long row) {
    return {s.age[row], s.mean + row * n, s.precision + row * n * n, s.z + row * (H + 1) * n,
            s.u + row * H * m, s.counts + row * H * N, s.mask + row * H * N};
}
