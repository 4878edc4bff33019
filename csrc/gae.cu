// Generalised advantage estimation on a GPU: one launch, each token read and written once. See scan.cuh.
#include "gae.h"

#include "scan.cuh"

namespace saferlhf {
namespace cuda {
namespace {

template <typename T, bool kBlock>
__global__ void __launch_bounds__(kMaxThreads, sizeof(T) == 4 ? 3 : 1) gae_kernel(T* __restrict__ advantages, T* __restrict__ returns,
                                                          const T* __restrict__ rewards, const T* __restrict__ values,
                                                          Rows rows, Decay<T> k, bool aligned) {
  __shared__ Chain<1> chain;
  const Team<kBlock> team;
  int turn = 0;
  for (int64_t row = team.first; row < rows.count; row += team.apart) {
    const int64_t begin = rows.begin(row), end = rows.end(row);
    double state[1] = {0.0};
    for (int64_t high = (end - 1) / kQuad; begin < end && high >= begin / kQuad; high -= team.size, turn ^= 1) {
      const Quad quad(high - (team.size - 1) + team.rank, begin, end, rows, aligned);
      T r[kQuad], v[kQuad], handed[1];
      quad.read(r, rewards);
      quad.read(v, values);
      Map<T, 1> map;
      multiply(map, 0, quad, r, v, k);
      scan_tile<kBlock>(handed, state, map, quad.valid, turn, k, chain);
      for (int j = kQuad - 1; j >= 0; --j) {
        const T after = handed[0];
        handed[0] = quad.decay_of(j, k) * after + k.add(r[j], v[j]);
        v[j] = r[j] - v[j] + after;
        r[j] += after;
      }
      quad.write(advantages, v);
      quad.write(returns, r);
    }
  }
  zero_tail(advantages, rows);
  zero_tail(returns, rows);
}

template <typename T>
const char* run(void* advantages, void* returns, const void* rewards, const void* values, const Rows& rows, double gamma,
                double lam, bool carry, void* stream) {
  const Shape shape(rows);
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
