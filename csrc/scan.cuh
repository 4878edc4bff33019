// What the two backward scans share on a GPU: the recurrence of scan.h, four tokens a thread, a team of threads per row.
//
// A token is the map D -> decay * D + add; a row is their product, taken from its end. A thread multiplies its four tokens,
// a warp scans its 32 threads by shuffles, and the warps of a block are chained one after another through shared memory in
// double: 128 tokens a step, so that long rows lose no digits. Every step has a fixed place, so equal inputs give equal bits.
// A team is a block (long rows) or a warp (rows of up to 128 tokens); it walks over its row from the end in tiles.
//
// Compiled by nvcc, and by a C++ compiler against tests/cuda_on_cpu/, which runs the threads of a block as fibers.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common.h"

namespace saferlhf::cuda {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kQuad = 4;            // tokens of a thread
constexpr int kMaxThreads = 256;    // of a block
constexpr int kMaxWarps = kMaxThreads / 32;
constexpr int kMaxBlocks = 1024;    // of a launch: enough for any GPU, few enough for one block to add up what they leave

template <typename T>
struct Decay {
  T decay, value;       // D_t = decay * (D_{t+1} + r_t) + value * V_t
  T quad;               // decay^4
  double exact, chunk;  // decay, and decay^128
  bool carry;           // a masked token passes D on as it is; else it multiplies it by decay

  Decay(double gamma, double lam, bool carry) : exact(gamma * lam), chunk(exact), carry(carry) {
    decay = T(exact), value = T(gamma - exact), quad = T(exact * exact * exact * exact);
    for (int i = 0; i < 7; ++i) chunk *= chunk;
  }
  __device__ T add(T reward, T token_value) const { return decay * reward + value * token_value; }
};

template <bool kBlock>
struct Team {
  int rank, size;        // of this thread; of the team
  int64_t first, apart;  // the team's first row, and how far it is to its next

  __device__ Team() {
    const int warps = blockDim.x / 32;
    rank = kBlock ? threadIdx.x : threadIdx.x % 32;
    size = kBlock ? blockDim.x : 32;
    first = kBlock ? int64_t(blockIdx.x) : int64_t(blockIdx.x) * warps + threadIdx.x / 32;
    apart = kBlock ? int64_t(gridDim.x) : int64_t(gridDim.x) * warps;
  }
  __device__ void sync() const {
    if (kBlock) __syncthreads();
    else __syncwarp();
  }
};

// The four tokens 4 * quad .. 4 * quad + 3 of flat vectors, as far as they lie in the row begin .. end. Bit j is token j.
struct Quad {
  int64_t at;     // the first token
  int inside;     // tokens of the row
  int valid;      // tokens of the row that the mask does not hide
  bool together;  // all four may be read at once: 16-byte loads, none past the end of the vectors

  __device__ Quad(int64_t quad, int64_t begin, int64_t end, const Rows& rows, bool aligned)
      : at(quad * kQuad), inside(0), valid(0) {
    for (int j = 0; j < kQuad; ++j) inside |= int(at + j >= begin && at + j < end) << j;
    together = aligned && inside != 0 && at + kQuad <= rows.tokens;
    if (rows.mask == nullptr || inside == 0) {
      valid = inside;
    } else if (together) {
      const uint32_t bytes = *reinterpret_cast<const uint32_t*>(rows.mask + at);
      for (int j = 0; j < kQuad; ++j) valid |= int((bytes >> (8 * j) & 0xff) != 0) << j;
      valid &= inside;
    } else {
      for (int j = 0; j < kQuad; ++j) valid |= int((inside >> j & 1) && rows.mask[at + j] != 0) << j;
    }
  }

  template <typename T>
  struct alignas(16) Sixteen {
    T of[16 / sizeof(T)];
  };

  // Values of the valid tokens, 0 for the others, which are never looked at.
  template <typename T>
  __device__ void read(T (&x)[kQuad], const T* from) const {
    constexpr int kEach = 16 / sizeof(T);
    if (together && valid) {
      for (int i = 0; i < kQuad / kEach; ++i) {
        const Sixteen<T> some = reinterpret_cast<const Sixteen<T>*>(from + at)[i];
        for (int j = 0; j < kEach; ++j) x[i * kEach + j] = some.of[j];
      }
      for (int j = 0; j < kQuad; ++j) x[j] = valid >> j & 1 ? x[j] : T(0);
    } else {
      for (int j = 0; j < kQuad; ++j) x[j] = valid >> j & 1 ? from[at + j] : T(0);
    }
  }
  // The row's tokens; 0 where not valid.
  template <typename T>
  __device__ void write(T* to, const T (&x)[kQuad]) const {
    constexpr int kEach = 16 / sizeof(T);
    if (together && inside == (1 << kQuad) - 1) {
      for (int i = 0; i < kQuad / kEach; ++i) {
        Sixteen<T> some;
        for (int j = 0; j < kEach; ++j) some.of[j] = valid >> (i * kEach + j) & 1 ? x[i * kEach + j] : T(0);
        reinterpret_cast<Sixteen<T>*>(to + at)[i] = some;
      }
    } else {
      for (int j = 0; j < kQuad; ++j) {
        if (inside >> j & 1) to[at + j] = valid >> j & 1 ? x[j] : T(0);
      }
    }
  }
  // What token j does to D that comes from its right.
  template <typename T>
  __device__ T decay_of(int j, const Decay<T>& k) const {
    return k.carry && !(valid >> j & 1) ? T(1) : k.decay;
  }
};

// D -> decay * D + add, for each stream.
template <typename T, int kStreams>
struct Map {
  T decay;
  T add[kStreams];
};

// x to the n, for n up to 128.
__device__ inline double power(double x, int n) {
  double result = 1;
  for (; n > 0; n >>= 1, x *= x) result *= n & 1 ? x : 1.0;
  return result;
}

// What the warps of a block leave for each other, in two turns: one may be written while the other is still read.
template <int kStreams>
struct Chain {
  double decay[2][kMaxWarps];
  double add[2][kStreams][kMaxWarps];
};

// The product of a thread's four tokens with rewards r and values v, for stream s of `map`.
template <typename T, int kStreams>
__device__ void multiply(Map<T, kStreams>& map, int s, const Quad& quad, const T (&r)[kQuad], const T (&v)[kQuad],
                         const Decay<T>& k) {
  T decay = T(1), add = T(0);
  for (int j = kQuad - 1; j >= 0; --j) {
    add = quad.decay_of(j, k) * add + k.add(r[j], v[j]);
    decay *= quad.decay_of(j, k);
  }
  map.decay = k.carry ? decay : k.quad;  // the latter is rounded once
  map.add[s] = add;
}

// handed: D right of this thread's tokens, whose product is `map`. state: D right of the team's tile; becomes that left of it.
template <bool kBlock, typename T, int kStreams>
__device__ void scan_tile(T (&handed)[kStreams], double (&state)[kStreams], Map<T, kStreams> map, int valid, int turn,
                          const Decay<T>& k, Chain<kStreams>& chain) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int step = 1; step < 32; step *= 2) {
    const T decay = __shfl_down_sync(kAll, map.decay, step);
    for (int s = 0; s < kStreams; ++s) {
      const T add = __shfl_down_sync(kAll, map.add[s], step);
      if (lane + step < 32) map.add[s] += map.decay * add;
    }
    if (lane + step < 32) map.decay *= decay;
  }
  // The whole warp's decay, exact: its rounding would grow with the length of the row.
  double whole = k.chunk;
  if (k.carry) {
    int count = __popc(valid);
    for (int step = 16; step > 0; step /= 2) count += __shfl_xor_sync(kAll, count, step);
    whole = power(k.exact, count);
  }
  double mine[kStreams] = {};
  if (kBlock) {
    if (lane == 0) {
      chain.decay[turn][warp] = whole;
      for (int s = 0; s < kStreams; ++s) chain.add[turn][s][warp] = double(map.add[s]);
    }
    __syncthreads();
    for (int w = int(blockDim.x) / 32 - 1; w >= 0; --w) {
      for (int s = 0; s < kStreams; ++s) {
        if (w == warp) mine[s] = state[s];
        state[s] = chain.add[turn][s][w] + chain.decay[turn][w] * state[s];
      }
    }
  } else {
    for (int s = 0; s < kStreams; ++s) {
      mine[s] = state[s];
      state[s] = double(__shfl_sync(kAll, map.add[s], 0)) + whole * state[s];
    }
  }
  const T decay = __shfl_down_sync(kAll, map.decay, 1);
  for (int s = 0; s < kStreams; ++s) {
    const T add = __shfl_down_sync(kAll, map.add[s], 1);
    handed[s] = lane == 31 ? T(mine[s]) : add + decay * T(mine[s]);
  }
}

// Zeros past the last offset.
template <typename T>
__device__ void zero_tail(T* to, const Rows& rows) {
  const int64_t apart = int64_t(gridDim.x) * blockDim.x;
  for (int64_t at = rows.covered() + int64_t(blockIdx.x) * blockDim.x + threadIdx.x; at < rows.tokens; at += apart) {
    to[at] = T(0);
  }
}

// How rows are spread over a launch. The mean length is all that the host knows without waiting for the device.
struct Shape {
  bool block;  // a block per row; else a warp per row
  int threads, blocks;

  explicit Shape(const Rows& rows) {
    const int64_t mean = rows.count > 0 ? rows.tokens / rows.count : 0;
    block = mean > 32 * kQuad;
    threads = block && mean <= kMaxThreads / 2 * kQuad ? kMaxThreads / 2 : kMaxThreads;
    const int64_t wanted = block ? rows.count : (rows.count + threads / 32 - 1) / (threads / 32);
    blocks = int(wanted < 1 ? 1 : wanted < kMaxBlocks ? wanted : kMaxBlocks);
  }
};

// Whether 16-byte loads of these vectors are allowed (and 4-byte loads of the mask).
inline bool aligned(const Rows& rows, const void* const* vectors, int count) {
  uintptr_t bits = reinterpret_cast<uintptr_t>(rows.mask) & 3;
  for (int i = 0; i < count; ++i) bits |= reinterpret_cast<uintptr_t>(vectors[i]) & 15;
  return bits == 0;
}

// Launches kernel(arguments...); nullptr or what the driver says. Nothing is waited for.
template <typename... Wanted, typename... Given>
const char* launch(void (*kernel)(Wanted...), const Shape& shape, void* stream, const Given&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(shape.blocks);
  config.blockDim = dim3(shape.threads);
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, Wanted(arguments)...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace saferlhf::cuda
