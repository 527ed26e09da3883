// The LQR recursion around a window's trajectory, and the covariance of its newest state.
//
// With G = V [B | A], Quu = R + B'VB + damping = U'U, L = U^-T and W = L B'VA, as on the CPU:
//
//     V = Q + A'VA - W'W,   K = -L'W,   w = L (r + B'v),   v <- q + A'v - W'w,   k = -L'w
//
// The first warp takes Cholesky's pivots while the others form A'VA. What the step promises is
// 1/2 sum |w|^2 + 1/2 v_0' V_0^-1 v_0, the optimum of the damped problem, and half the damping times
// the step's square: without damping no forward recursion is needed.

constexpr int CHOLESKY_COLUMNS = 2 * m;

// A window's numbers: in shared memory where they fit and a multiprocessor has one stream to do, else
// in this block's part of global memory, from where a step's block is fetched ahead.
struct alignas(32) Window {
    real z[2][(H + 1) * n], u[2][H * m], f[2][H * n], h[2][H * n];
    alignas(32) real d[2][H * N4];
    alignas(32) real w[2][H * N4];
    alignas(32) real blocks[(H + 1) * n * LD];
    alignas(32) real K[H * m * n4];
    alignas(32) real L[H * m * m4];
    real k[H * m], q[(H + 1) * n], r[H * m], share[H];
    real dz[n], du[most(m, 1)];
    real given[most(LAGS * 3 * RECURRENT, 1)];
};

// One step of the recursion.
struct alignas(32) Stage {
    real V[n * n4], D[n * n4], G[n4 * LDG], Hu[m4 * LDG], W[m * n4];
    alignas(32) real block[IN_SHARED ? 4 : 2 * n * LD];
    real L[m * m4];
    double E[m * m], Lt[m * m], v[n], gx[n], gu[m], w[m], k[m], promise;
    int good;
};

// Where step t's block is; where windows are in global memory it is being fetched (``fetch``).
__device__ inline real* at_hand(Window& win, Stage& s, int t) {
    return IN_SHARED ? win.blocks + t * n * LD : s.block + (t & 1) * n * LD;
}

__device__ inline void fetch(Window& win, Stage& s, int t) {
    if (IN_SHARED) return;
    const real* from = win.blocks + t * n * LD;
    real* to = s.block + (t & 1) * n * LD;
    constexpr int WIDE = 16 / sizeof(real);
    EACH(e, n * LD / WIDE) copy_16(to + e * WIDE, from + e * WIDE);
}

// L (m x m, lower) with L'L = Quu^-1 from the upper triangle E of Quu, by one warp, a column a lane:
// [Quu | I] eliminated to [U | L]. False where Quu is not positive definite.
__device__ bool cholesky(const double* E, double* L) {
    int lane = threadIdx.x % 32;
    for (int first = 0; first < CHOLESKY_COLUMNS; first += 32) {
        // columns beyond the first 32 need the rows that the first ones leave: each round does all
        int j = first + lane;
        bool mine = j < CHOLESKY_COLUMNS;
        double e[m], own[m];
#pragma unroll
        for (int i = 0; i < m; i++) {
            own[i] = lane < m && i <= lane ? E[i * m + lane] : 0;
            e[i] = !mine ? 0 : j < m ? (i <= j ? E[i * m + j] : 0) : double(i == j - m);
        }
        double scale[m];
#pragma unroll
        for (int p = 0; p < m; p++) {
            double pivot = __shfl_sync(0xffffffffu, own[p], p);
            if (!(pivot > 0 && pivot > m * 2.220446049250313e-16 * E[p * m + p])) return false;
            double over = 1 / pivot;
            scale[p] = pivot;
#pragma unroll
            for (int i = p + 1; i < m; i++) {
                double factor = __shfl_sync(0xffffffffu, own[p], i) * over;
                own[i] -= factor * own[p];
                e[i] -= factor * e[p];
            }
        }
        double root = 1;
#pragma unroll
        for (int i = 0; i < m; i++) root = lane == i ? scale[i] : root;
        root = rsqrt(root);
#pragma unroll
        for (int i = 0; i < m; i++) {
            double row = e[i] * __shfl_sync(0xffffffffu, root, i);
            if (mine && j >= m) L[i * m + j - m] = i >= j - m ? row : 0;
        }
    }
    return true;
}

// The recursion backwards; K, k, L, V_0 (in s.V) and v_0. Returns whether every Quu was definite.
__device__ bool backward(
    const Weights& weights, Window& win, Stage& s, double damping, double& promised
) {
    sync();
    fetch(win, s, H);
    fetch_done();
    sync();
    const real* last = at_hand(win, s, H) + QT;
    EACH(e, n * n) s.V[e / n * n4 + e % n] = last[e / n * LD + e % n];
    EACH(i, n) s.v[i] = win.q[H * n + i];
    if (threadIdx.x == 0) s.promise = 0, s.good = 1;
    fetch(win, s, H - 1);
    fetch_done();
    sync();
    for (int t = H - 1; t >= 0; t--) {
        const real *block = at_hand(win, s, t), *A = block + AT, *Q = block + QT;
        if (t) fetch(win, s, t - 1);
        EACH(e, ROWS4 * (LDG / 2)) {  // G = V [B | A]
            int i0 = e % ROWS4 * 4, j0 = e / ROWS4 * 2;
            real x[4][2] = {};
            tile<n>(s.V + i0, n4, block + j0, LD, x);
#pragma unroll
            for (int a = 0; a < 4; a++) s.G[(i0 + a) * LDG + j0] = x[a][0], s.G[(i0 + a) * LDG + j0 + 1] = x[a][1];
        }
        EACH_LAST(i, n + m) {  // q + A'v and r + B'v
            double total = i < n ? win.q[t * n + i] : win.r[t * m + i - n];
            const real* column = i < n ? A + i : block + i - n;
            for (int k = 0; k < n; k++) total += column[k * LD] * s.v[k];
            if (i < n) s.gx[i] = total;
            else s.gu[i - n] = total;
        }
        sync();
        EACH(e, m * (LDG / 2)) {  // B'G = [Quu | Qux]
            int a = e % m, j0 = e / m * 2;
            real x = 0, y = 0;
#pragma unroll 8
            for (int k = 0; k < n; k++) {
                Two two = *(const Two*)(s.G + k * LDG + j0);
                real b = block[k * LD + a];
                x += b * two.v[0], y += b * two.v[1];
            }
            s.Hu[a * LDG + j0] = x, s.Hu[a * LDG + j0 + 1] = y;
        }
        sync();
        if (threadIdx.x < 32) {
            for (int e = threadIdx.x; e < m * m; e += 32) {
                int a = e / m, b = e % m;
                real x = s.Hu[a * LDG + b];
                s.E[e] = a == b ? x + double(win.share[t]) * weights.prior[a] + damping : x;
            }
            __syncwarp();
            bool good = cholesky(s.E, s.Lt);
            __syncwarp();
            for (int e = threadIdx.x; e < m * m && good; e += 32) {
                int a = e / m, b = e % m;
                s.L[a * m4 + b] = win.L[(t * m + a) * m4 + b] = s.Lt[e];
            }
            for (int a = threadIdx.x; a < m && good; a += 32) {
                double total = 0;
                for (int b = 0; b <= a; b++) total += s.Lt[a * m + b] * s.gu[b];
                s.w[a] = total;
            }
            __syncwarp();
            for (int a = threadIdx.x; a < m && good; a += 32) {
                double total = 0;
                for (int b = a; b < m; b++) total += s.Lt[b * m + a] * s.w[b];
                win.k[t * m + a] = -total;
            }
            if (threadIdx.x == 0) {
                if (!good) s.good = 0;
                else for (int a = 0; a < m; a++) s.promise += 0.5 * s.w[a] * s.w[a];
            }
        }
        // the first warp is busy: where there are others, they alone
        constexpr int FIRST = THREADS > 32 ? 32 : 0;
        for (int e = int(threadIdx.x) - FIRST; e < UPPER; e += THREADS - FIRST) {  // A'VA
            if (e < 0) break;
            Place at = upper(e);
            real x[4][2] = {};
            tile<n>(A + at.i, LD, s.G + AT + at.j, LDG, x);
#pragma unroll
            for (int a = 0; a < 4; a++)
                if (at.i + a < n) s.D[(at.i + a) * n4 + at.j] = x[a][0], s.D[(at.i + a) * n4 + at.j + 1] = x[a][1];
        }
        sync();
        if (!s.good) return false;
        EACH(e, m * n) {  // W = L Qux
            int a = e / n, j = e % n;
            real x = 0;
            for (int b = 0; b <= a; b++) x += s.L[a * m4 + b] * s.Hu[b * LDG + AT + j];
            s.W[a * n4 + j] = x;
        }
        sync();
        EACH(e, UPPER) {  // V = Q + A'VA - W'W
            Place at = upper(e);
            real x[4][2] = {};
            tile<m>(s.W + at.i, n4, s.W + at.j, n4, x);
#pragma unroll
            for (int a = 0; a < 4; a++)
#pragma unroll
                for (int b = 0; b < 2; b++) {
                    int i = at.i + a, j = at.j + b;
                    if (i <= j && j < n)
                        x[a][b] = Q[i * LD + j] + s.D[i * n4 + j] - x[a][b];
                }
            store_symmetric(s.V, at, x);
        }
        EACH_LAST(e, m * n) {  // K = -L'W
            int a = e / n, j = e % n;
            real x = 0;
            for (int b = a; b < m; b++) x += s.L[b * m4 + a] * s.W[b * n4 + j];
            win.K[(t * m + a) * n4 + j] = -x;
        }
        EACH_LAST(i, n) {
            double total = s.gx[i];
            for (int a = 0; a < m; a++) total -= s.W[a * n4 + i] * s.w[a];
            s.v[i] = total;
        }
        fetch_done();
        sync();
    }
    promised = s.promise;
    return true;
}

// dz_0 = -V_0^-1 v_0 with the damping added to V_0, whose inverse is left in inv.S; the decrease that
// the whole step promises. False where V_0 is not positive definite or something is not finite.
__device__ bool initial_step(
    Window& win, Stage& s, Inverse& inv, double* room, double damping, double& decrease
) {
    EACH(e, n * n) inv.S[e / n * LDS + e % n] = s.V[e / n * n4 + e % n] + (e / n == e % n ? damping : 0);
    EACH(i, n) inv.S[i * LDS + n] = s.v[i];
    if (!invert(inv)) return false;
    double part = 0, odd = 0;
    EACH(i, n) {
        win.dz[i] = -inv.S[i * LDS + n];
        part += 0.5 * s.v[i] * inv.S[i * LDS + n];
    }
    EACH(e, n * LDS) odd += is_finite(inv.S[e]) ? 0 : 1;
    decrease += sum(part, room);
    odd = sum(odd, room);
    if (damping > 0) {
        // a damped step: its square, by the forward recursion
        double squares = 0;
        EACH(i, n) s.gx[i] = -inv.S[i * LDS + n];
        sync();
        for (int t = 0; t < H; t++) {
            const real* block = win.blocks + t * n * LD;
            EACH(a, m) {
                double total = win.k[t * m + a];
                for (int j = 0; j < n; j++) total += win.K[(t * m + a) * n4 + j] * s.gx[j];
                s.gu[a] = total, squares += total * total;
            }
            if (t == 0) EACH(i, n) squares += s.gx[i] * s.gx[i];
            sync();
            EACH(i, n) {
                double total = 0;
                for (int a = 0; a < m; a++) total += block[i * LD + a] * s.gu[a];
                for (int j = 0; j < n; j++) total += block[i * LD + AT + j] * s.gx[j];
                s.v[i] = total;
            }
            sync();
            EACH(i, n) s.gx[i] = s.v[i];
            sync();
        }
        decrease += 0.5 * damping * sum(squares, room);
    }
    return odd == 0 && is_finite(decrease);
}

// Covariance of the state after ``newest`` bins, into s.V, from V_0^-1 in inv.S. The window's blocks
// and K are used up: with F = B L', each step is (A + B K) S (A + B K)' + F F'.
__device__ void covariance(Window& win, Stage& s, const Inverse& inv, int newest) {
    sync();
    EACH(e, n * n) {
        int i = e / n, j = e % n;
        s.V[i * n4 + j] = 0.5 * (inv.S[i * LDS + j] + inv.S[j * LDS + i]);
    }
    EACH(e, newest * n * n) {  // the transpose of A + B K takes Q's place
        int t = e / (n * n), l = e / n % n, i = e % n;
        real *row = win.blocks + (t * n + i) * LD, x = row[AT + l];
        for (int a = 0; a < m; a++) x += row[a] * win.K[(t * m + a) * n4 + l];
        win.blocks[(t * n + l) * LD + QT + i] = x;
    }
    sync();
    EACH(e, newest * m * n) {  // and that of F takes K's
        int t = e / (m * n), a = e / n % m, i = e % n;
        const real *row = win.blocks + (t * n + i) * LD, *L = win.L + (t * m + a) * m4;
        real x = 0;
        for (int b = 0; b <= a; b++) x += row[b] * L[b];
        win.K[(t * m + a) * n4 + i] = x;
    }
    sync();
    if (newest) fetch(win, s, 0);
    fetch_done();
    sync();
    for (int t = 0; t < newest; t++) {
        const real *closed = at_hand(win, s, t) + QT, *F = win.K + t * m * n4;
        if (t + 1 < newest) fetch(win, s, t + 1);
        EACH(e, ROWS4 * COLUMNS2) {
            int i0 = e % ROWS4 * 4, j0 = e / ROWS4 * 2;
            real x[4][2] = {};
            tile<n>(s.V + i0, n4, closed + j0, LD, x);
#pragma unroll
            for (int a = 0; a < 4; a++) s.G[(i0 + a) * LDG + j0] = x[a][0], s.G[(i0 + a) * LDG + j0 + 1] = x[a][1];
        }
        sync();
        EACH(e, UPPER) {
            Place at = upper(e);
            real x[4][2] = {};
            tile<n>(closed + at.i, LD, s.G + at.j, LDG, x);
            tile<m>(F + at.i, n4, F + at.j, n4, x);
            store_symmetric(s.V, at, x);
        }
        fetch_done();
        sync();
    }
}
