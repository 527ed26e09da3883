// What the phases of a step share: loops over outputs, sums, tiles of products, one inverse.
//
// A block of THREADS threads works on one stream. Every phase is a loop over its outputs, shared out
// among the threads; a phase that reads what another thread wrote begins after a barrier. Sums over
// channels and bins, pivots and what is solved with them are double, whatever `real` is. No number
// depends on the grid, so a stream's bits depend neither on its row nor on who else is there.

#define EACH(i, count) for (int i = threadIdx.x; i < (count); i += THREADS)
// the same, begun by the last threads: for what is done beside a phase that keeps the first ones busy
#define EACH_LAST(i, count) for (int i = THREADS - 1 - threadIdx.x; i < (count); i += THREADS)

__device__ constexpr int up(int size, int unit) { return (size + unit - 1) / unit * unit; }
__device__ constexpr int most(int a, int b) { return a > b ? a : b; }

// Row lengths: a multiple of four, so that four numbers are one load. Nothing is read of the pads
// but what goes to a pad. A block of the window holds [B | A | Q] side by side.
constexpr int n4 = up(n, 4), m4 = up(m, 4), N4 = up(N, 4);
constexpr int LD = m4 + 2 * n4, AT = m4, QT = m4 + n4, LDG = m4 + n4;
// rows of C are read by neighbours at once: an odd number of fours, so that no two share a bank
constexpr int LDC = n4 / 4 % 2 ? n4 : n4 + 4;
// threads that roll out, one a latent
constexpr int TEAM = up(most(n, m), 32);
static_assert(TEAM <= THREADS && THREADS % 32 == 0, "a block holds a team");

struct alignas(4 * sizeof(real)) Four { real v[4]; };
struct alignas(2 * sizeof(real)) Two { real v[2]; };

__device__ inline bool is_finite(double x) { return fabs(x) <= (sizeof(real) == 4 ? 3.4028234e38 : 1.7976931348623157e308); }
__device__ inline void sync() { __syncthreads(); }
__device__ inline void team_sync() {
    if (TEAM == 32) __syncwarp();
    else part_sync(1, TEAM);
}

// The sum of every thread's x, known to all.
__device__ double sum(double x, double* room) {
    for (int s = 16; s; s /= 2) x += __shfl_xor_sync(0xffffffffu, x, s);
    sync();  // the last sum may still be read
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
    sync();
    double total = 0;
    for (int i = 0; i < THREADS / 32; i++) total += room[i];
    return total;
}

// w . x for a row w of L numbers held in registers.
template <int L> __device__ inline real dot(const real (&w)[L], const real* x) {
    real s[4] = {0, 0, 0, 0};
#pragma unroll
    for (int k = 0; k + 4 <= L; k += 4) {
        Four v = *(const Four*)(x + k);
#pragma unroll
        for (int i = 0; i < 4; i++) s[i] += w[k + i] * v.v[i];
    }
#pragma unroll
    for (int k = L / 4 * 4; k < L; k++) s[k % 4] += w[k] * x[k];
    return (s[0] + s[1]) + (s[2] + s[3]);
}

template <int L> __device__ inline void load_row(real (&w)[L], const real* from) {
#pragma unroll
    for (int k = 0; k < L; k++) w[k] = from[k];
}

// s += X' Y of four columns of X and two of Y, over L rows.
template <int L>
__device__ inline void tile(const real* X, int ldx, const real* Y, int ldy, real (&s)[4][2]) {
#pragma unroll 4
    for (int l = 0; l < L; l++) {
        Four x = *(const Four*)(X + l * ldx);
        Two y = *(const Two*)(Y + l * ldy);
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 2; j++) s[i][j] += x.v[i] * y.v[j];
    }
}

constexpr int ROWS4 = n4 / 4, COLUMNS2 = n4 / 2;
// Tiles that touch the upper triangle of an n x n matrix.
constexpr int UPPER = ROWS4 * COLUMNS2 - ROWS4 * (ROWS4 - 1);

struct Place { int i, j; };

// Where the upper triangle's tile number e begins.
__device__ inline Place upper(int e) {
    int a = 0;
    while (e >= COLUMNS2 - 2 * a) e -= COLUMNS2 - 2 * a++;
    return {4 * a, 4 * a + 2 * e};
}

// A tile's part of the upper triangle to both triangles of the symmetric V (n x n4).
__device__ inline void store_symmetric(real* V, Place at, const real (&s)[4][2]) {
#pragma unroll
    for (int a = 0; a < 4; a++)
#pragma unroll
        for (int b = 0; b < 2; b++) {
            int i = at.i + a, j = at.j + b;
            if (i <= j && j < n) V[i * n4 + j] = V[j * n4 + i] = s[a][b];
        }
}

// What the inversion of an n x n matrix needs: the matrix with one more column, then copies.
constexpr int LDS = n + 1;
struct Inverse { double S[n * LDS], row[LDS], column[n], diagonal[n]; };

// S := [M^-1 | M^-1 b] for S = [M | b], M symmetric, by Gauss-Jordan. Returns whether M is positive
// definite to working precision: each pivot, the square of Cholesky's, above n eps its diagonal entry.
__device__ bool invert(Inverse& s) {
    sync();
    EACH(i, n) s.diagonal[i] = s.S[i * LDS + i];
    for (int p = 0; p < n; p++) {
        sync();
        EACH(j, LDS) s.row[j] = s.S[p * LDS + j];
        EACH_LAST(i, n) s.column[i] = s.S[i * LDS + p];
        sync();
        double pivot = s.row[p];
        if (!(pivot > 0 && pivot > n * 2.220446049250313e-16 * s.diagonal[p])) return false;
        double over = 1 / pivot;
        EACH(e, n * LDS) {
            int i = e / LDS, j = e % LDS;
            double f = s.column[i], x = s.row[j] * over;
            if (i == p) s.S[e] = j == p ? over : x;
            else s.S[e] = j == p ? -f * over : s.S[e] - f * x;
        }
    }
    sync();
    return true;
}
