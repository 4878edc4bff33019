// Generalised advantage estimation on a GPU: one launch, each token read and written once. See scan.cuh.
#include "gae.h"

#include "scan.cuh"

namespace saferlhf {
namespace cuda {
namespace {

template <typename T>
constexpr int kPerSM = sizeof(T) == 4 ? 3 : 2;  // blocks per SM that the registers allow without spilling

template <typename T, bool kBlock>
__global__ void __launch_bounds__(kMaxThreads, kPerSM<T>)
gae_kernel(T* advantages, T* returns, const T* rewards, const T* values, const Rows rows, const Decay<T> k, bool aligned) {
  constexpr int kChunks = Team<kBlock>::kChunks;
  __shared__ Chain<1> chain;
  const Team<kBlock> team;
  const T* const from[2] = {rewards, values};
  int turn = 0;
  for (int64_t row = team.first; row < rows.count; row += team.apart) {
    const int64_t begin = rows.begin(row), end = rows.end(row);
    double state[1] = {0.0};
    for (int64_t high = (end - 1) / kQuad; begin < end && high >= begin / kQuad; high -= team.quads(), turn ^= 1) {
      Quad quads[kChunks];
      T x[kChunks][2][kQuad], handed[kChunks][1], decay[kQuad];
      Map<T, 1> maps[kChunks];
      for (int g = 0; g < kChunks; ++g) {
        quads[g] = Quad(high - team.quads() + 1 + team.place(g), begin, end, rows, aligned);
      }
      for (int g = 0; g < kChunks; ++g) quads[g].fetch(x[g], from);
      for (int g = 0; g < kChunks; ++g) {
        quads[g].look();
        quads[g].keep(x[g]);
        quads[g].decays(decay, k);
        multiply(maps[g], 0, decay, x[g][0], x[g][1], k);
      }
      scan_tile<kBlock>(handed, state, maps, quads, turn, k, team, chain);
      for (int g = 0; g < kChunks; ++g) {
        quads[g].decays(decay, k);
        for (int j = kQuad - 1; j >= 0; --j) {
          T &r = x[g][0][j], &v = x[g][1][j], after = handed[g][0];
          handed[g][0] = decay[j] * after + k.add(r, v);
          r = quads[g].valid >> j & 1 ? r + after : T(0);  // r becomes the return, v the advantage
          v = r - v;
        }
        quads[g].write(returns, x[g][0]);
        quads[g].write(advantages, x[g][1]);
      }
    }
  }
  zero_tail(advantages, rows);
  zero_tail(returns, rows);
}

template <typename T>
const char* run(void* advantages, void* returns, const void* rewards, const void* values, const Rows& rows, double gamma,
                double lam, bool carry, void* stream) {
  const Shape shape(rows, kPerSM<T>);
  const void* vectors[] = {advantages, returns, rewards, values};
  return launch(shape.block ? gae_kernel<T, true> : gae_kernel<T, false>, shape, stream, static_cast<T*>(advantages),
                static_cast<T*>(returns), static_cast<const T*>(rewards), static_cast<const T*>(values), rows,
                Decay<T>(gamma, lam, carry), aligned(rows, vectors, 4));
}

}  // namespace
}  // namespace cuda

const char* gae_cuda(void* advantages, void* returns, const void* rewards, const void* values, const Rows& rows, int dtype,
                     double gamma, double lam, bool carry, void* stream) {
  const auto run = dtype == kFloat64 ? cuda::run<double> : cuda::run<float>;
  return run(advantages, returns, rewards, values, rows, gamma, lam, carry, stream);
}

}  // namespace saferlhf
