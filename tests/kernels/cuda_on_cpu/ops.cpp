// The CUDA launchers under C names, for ctypes: addresses and sizes as csrc/bindings.cpp passes them.
#include <cuda_runtime.h>

#include "gae.h"
#include "ppo_lag_advantage.h"

extern "C" {

void set_order(int order) { emulator_order = order; }

const char* gae(void* advantages, void* returns, const void* rewards, const void* values, const int32_t* offsets,
                const uint8_t* mask, int64_t tokens, int64_t count, int64_t width, int dtype, double gamma, double lam,
                bool carry) {
  return saferlhf::gae_cuda(advantages, returns, rewards, values, {offsets, mask, tokens, count, width}, dtype, gamma, lam,
                            carry, nullptr);
}

const char* ppo_lag_advantage(void* advantages, void* reward_returns, void* cost_returns, void* statistics, const void* logp,
                              const void* ref_logp, const void* reward, const void* cost, const void* reward_values,
                              const void* cost_values, const void* multiplier, const int32_t* offsets, const uint8_t* mask,
                              int64_t tokens, int64_t count, int64_t width, int dtype, double kl_coeff, double gamma,
                              double lam, double clip_score, bool carry, double* partials, int* counter) {
  return saferlhf::ppo_lag_advantage_cuda(
      {advantages, reward_returns, cost_returns, statistics},
      {logp, ref_logp, reward, cost, reward_values, cost_values, multiplier}, {offsets, mask, tokens, count, width}, dtype,
      {kl_coeff, gamma, lam, clip_score, carry}, partials, counter, nullptr);
}

// Two kernels that are wrong, to see that it is noticed: half a block at a barrier; half a warp in a shuffle.
static void half_a_block(int* out) {
  if (threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = 1;
}
static void half_a_warp(int* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_sync(~0u, 1, 0);
}
const char* broken(int which, int* out) {
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(64);
  return cudaLaunchKernelEx(&config, which ? half_a_warp : half_a_block, out) == cudaSuccess ? nullptr
                                                                                             : cudaGetErrorString({});
}
}
