// The LQR recursion with sizes known to the compiler, by Eigen; float64. Built with -DSIZE_N,
// -DSIZE_M and -DSIZE_T.
// Reads the tensors A B Q q R r of one problem from stdin, writes V_0, K_0, the costates, the
// optimal dz and du, then one line of times per solve in nanoseconds.
#include <Eigen/Dense>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

constexpr int N = SIZE_N, M = SIZE_M, T = SIZE_T;

using Nn = Eigen::Matrix<double, N, N, Eigen::RowMajor>;
using Nm = Eigen::Matrix<double, N, M, (M == 1 ? Eigen::ColMajor : Eigen::RowMajor)>;
using Mn = Eigen::Matrix<double, M, N, (N == 1 ? Eigen::ColMajor : Eigen::RowMajor)>;
using Mm = Eigen::Matrix<double, M, M, Eigen::RowMajor>;
using Vn = Eigen::Matrix<double, N, 1>;
using Vm = Eigen::Matrix<double, M, 1>;

template <class X> static std::vector<X, Eigen::aligned_allocator<X>> many(int count) {
  return std::vector<X, Eigen::aligned_allocator<X>>(count);
}
template <class X> static void take(std::vector<X, Eigen::aligned_allocator<X>> &xs) {
  for (auto &x : xs)
    if (std::fread(x.data(), sizeof(double), x.size(), stdin) != (size_t)x.size()) std::exit(2);
}
template <class X> static void give(const X &x) {
  std::fwrite(x.data(), sizeof(double), x.size(), stdout);
}

int main(int argc, char **argv) {
  const int repeats = argc > 1 ? std::atoi(argv[1]) : 100;
  auto A = many<Nn>(T); auto B = many<Nm>(T); auto Q = many<Nn>(T + 1); auto q = many<Vn>(T + 1);
  auto R = many<Mm>(T); auto r = many<Vm>(T);
  take(A); take(B); take(Q); take(q); take(R); take(r);
  auto V = many<Nn>(T + 1); auto v = many<Vn>(T + 1); auto K = many<Mn>(T); auto k = many<Vm>(T);
  auto W = many<Mm>(T); auto z = many<Vn>(T + 1); auto u = many<Vm>(T); auto l = many<Vn>(T + 1);
  std::vector<double> times(repeats);
  bool ok = true;
  for (int i = 0; i < repeats; ++i) {
    auto began = std::chrono::steady_clock::now();
    V[T] = Q[T]; v[T] = q[T];
    for (int t = T - 1; t >= 0; --t) {
      Nn VA; VA.noalias() = V[t + 1] * A[t];
      Nm VB; VB.noalias() = V[t + 1] * B[t];
      Mm H; H.noalias() = B[t].transpose() * VB; H += R[t];
      Mn G; G.noalias() = B[t].transpose() * VA;
      Vm g = r[t]; g.noalias() += B[t].transpose() * v[t + 1];
      Eigen::LLT<Mm> factor(H);
      ok = ok && factor.info() == Eigen::Success;
      K[t] = -factor.solve(G); k[t] = -factor.solve(g); W[t] = factor.solve(Mm::Identity());
      Nn P; P.noalias() = A[t].transpose() * VA; P += Q[t]; P.noalias() += G.transpose() * K[t];
      V[t] = 0.5 * (P + P.transpose());
      v[t] = q[t]; v[t].noalias() += A[t].transpose() * v[t + 1];
      v[t].noalias() += G.transpose() * k[t];
    }
    Eigen::LLT<Nn> first(V[0]);
    ok = ok && first.info() == Eigen::Success;
    z[0] = -first.solve(v[0]);
    for (int t = 0; t < T; ++t) {
      u[t] = k[t]; u[t].noalias() += K[t] * z[t];
      z[t + 1].noalias() = A[t] * z[t]; z[t + 1].noalias() += B[t] * u[t];
    }
    for (int t = 0; t <= T; ++t) { l[t] = v[t]; l[t].noalias() += V[t] * z[t]; }
    times[i] = std::chrono::duration<double, std::nano>(
        std::chrono::steady_clock::now() - began).count();
  }
  if (!ok) return 3;
  for (auto &x : z) give(x);
  for (auto &x : u) give(x);
  std::fwrite(times.data(), sizeof(double), times.size(), stdout);
  return 0;
}
