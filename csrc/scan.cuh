// Code of both backward scans on a GPU: the recurrence of scan.h, computed by a team of threads per row.
//
// A token is the map D -> decay * D + add; a row is the product of its tokens' maps, from its end. A thread multiplies four
// tokens. A warp scans its 32 threads by shuffles (a chunk of 128 tokens; each thread reads and writes 16 bytes). Chunks are
// combined one after another, in double, so that long rows lose no digits. The order of all operations is fixed, so equal inputs
// give equal bits. A team is a block (two chunks per warp) or, for short rows, a warp (one chunk). It processes its row from the
// end in tiles.
//
// nvcc compiles this file, and so does a C++ compiler with tests/kernels/cuda_on_cpu/, which runs the threads of a block as fibers.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common.h"

namespace saferlhf::cuda {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kQuad = 4;           // tokens of a thread in a chunk
constexpr int kMaxThreads = 256;   // of a block
constexpr int kMaxWarps = kMaxThreads / 32;
constexpr int kMaxBlocks = 2048;   // of a launch

template <typename T>
struct Decay {
  T decay, value;       // D_t = decay * (D_{t+1} + r_t) + value * V_t
  T quad;               // decay^4
  double exact, chunk;  // decay and decay^128, in double: their rounding errors would add up over a long row
  bool carry;           // a masked token does not change D; otherwise it multiplies D by decay

  Decay(double gamma, double lam, bool carry) : exact(gamma * lam), chunk(exact), carry(carry) {
    decay = T(exact), value = T(gamma - exact), quad = T(exact * exact * exact * exact);
    for (int i = 0; i < 7; ++i) chunk *= chunk;
  }
  __device__ T add(T reward, T token_value) const { return decay * reward + value * token_value; }
};

template <bool kBlock>
struct Team {
  static constexpr int kChunks = kBlock ? 2 : 1;  // chunks per warp in a tile
  int rank, warp, warps;  // this thread's and its warp's place in the team; number of warps in the team
  int64_t first, apart;   // the team's first row, and the distance to its next one

  __device__ Team() {
    const int all = blockDim.x / 32, mine = threadIdx.x / 32;
    rank = kBlock ? threadIdx.x : threadIdx.x % 32;
    warp = kBlock ? mine : 0;
    warps = kBlock ? all : 1;
    first = kBlock ? int64_t(blockIdx.x) : int64_t(blockIdx.x) * all + mine;
    apart = kBlock ? int64_t(gridDim.x) : int64_t(gridDim.x) * all;
  }
  __device__ int quads() const { return warps * kChunks * 32; }  // of a tile
  // The place in the tile of this thread's quad in chunk `chunk` of its warp.
  __device__ int place(int chunk) const { return (warp * kChunks + chunk) * 32 + threadIdx.x % 32; }
  __device__ void sync() const {
    if (kBlock) __syncthreads();
    else __syncwarp();
  }
};

template <typename T>
struct alignas(16) Sixteen {
  static constexpr int count = 16 / sizeof(T);
  T of[count];
};

// The four tokens 4 * quad .. 4 * quad + 3 of flat vectors, as far as they are in the row begin .. end. Bit j is token j.
struct Quad {
  int64_t at;     // the first token
  int inside;     // tokens of the row
  int valid;      // valid tokens of the row; known after look()
  bool together;  // all four may be read at once: 16-byte loads that do not pass the end of the vectors
  uint32_t mask;  // mask of the four tokens, one byte each

  __device__ Quad() {}
  __device__ Quad(int64_t quad, int64_t begin, int64_t end, const Rows& rows, bool aligned) : at(quad * kQuad) {
    const int64_t before = begin - at, until = end - at;
    const int low = before <= 0 ? 0 : before < kQuad ? int(before) : kQuad;
    const int high = until <= 0 ? 0 : until < kQuad ? int(until) : kQuad;
    inside = low < high ? (1 << high) - (1 << low) : 0;
    together = aligned && inside != 0 && at + kQuad <= rows.tokens;
    mask = 0x01010101u;
    if (rows.mask == nullptr || inside == 0) return;
    if (together) {
      mask = *reinterpret_cast<const uint32_t*>(rows.mask + at);
    } else {
      for (int j = 0; j < kQuad; ++j) {
        if (inside >> j & 1 && rows.mask[at + j] == 0) mask &= ~(0xffu << (8 * j));
      }
    }
  }

  // Separate from the constructor, so that the constructor does not wait for the mask.
  __device__ void look() {
    // Sets the top bit of each byte that is not 0, then collects the four bits.
    const uint32_t on = (((mask & 0x7f7f7f7fu) + 0x7f7f7f7fu) | mask) & 0x80808080u;
    valid = inside & int(((on >> 7) * 0x10204080u) >> 28);
  }

  // Loads the row's tokens of several vectors; other entries are undefined. It does not wait for the loads, see keep(). Masked
  // tokens are loaded too, because waiting for the mask first would double the latency, but their values are never used.
  template <typename T, int kVectors>
  __device__ void fetch(T (&x)[kVectors][kQuad], const T* const (&from)[kVectors]) const {
    if (together) {
      for (int i = 0; i < kVectors; ++i) {
        for (int part = 0; part < kQuad / Sixteen<T>::count; ++part) {
          const Sixteen<T> some = reinterpret_cast<const Sixteen<T>*>(from[i] + at)[part];
          for (int j = 0; j < Sixteen<T>::count; ++j) x[i][part * Sixteen<T>::count + j] = some.of[j];
        }
      }
    } else {
      for (int i = 0; i < kVectors; ++i) {
        for (int j = 0; j < kQuad; ++j) x[i][j] = inside >> j & 1 ? from[i][at + j] : T(0);
      }
    }
  }
  // Replaces every entry that is not valid by 0, whatever was loaded.
  template <typename T, int kVectors>
  __device__ void keep(T (&x)[kVectors][kQuad]) const {
    for (int i = 0; i < kVectors; ++i) {
      for (int j = 0; j < kQuad; ++j) x[i][j] = valid >> j & 1 ? x[i][j] : T(0);
    }
  }
  // Stores the row's tokens.
  template <typename T>
  __device__ void write(T* to, const T (&x)[kQuad]) const {
    if (together && inside == (1 << kQuad) - 1) {
      for (int part = 0; part < kQuad / Sixteen<T>::count; ++part) {
        Sixteen<T> some;
        for (int j = 0; j < Sixteen<T>::count; ++j) some.of[j] = x[part * Sixteen<T>::count + j];
        reinterpret_cast<Sixteen<T>*>(to + at)[part] = some;
      }
    } else {
      for (int j = 0; j < kQuad; ++j) {
        if (inside >> j & 1) to[at + j] = x[j];
      }
    }
  }
  // The factor by which each token multiplies the D of its following token.
  template <typename T>
  __device__ void decays(T (&decay)[kQuad], const Decay<T>& k) const {
    for (int j = 0; j < kQuad; ++j) decay[j] = !k.carry || valid >> j & 1 ? k.decay : T(1);
  }
};

// D -> decay * D + add, for each stream.
template <typename T, int kStreams>
struct Map {
  T decay;
  T add[kStreams];
};

// x^n for n up to 128.
__device__ inline double power(double x, int n) {
  double result = 1;
  for (; n > 0; n >>= 1, x *= x) result *= n & 1 ? x : 1.0;
  return result;
}

// Results that the warps of a block share. There are two buffers (turns): one may be written while the other is still read.
template <int kStreams>
struct Chain {
  double decay[2][kMaxWarps];
  double add[2][kStreams][kMaxWarps];
};

// The product of four tokens with rewards r and values v, for stream `stream` of `map`.
template <typename T, int kStreams>
__device__ void multiply(Map<T, kStreams>& map, int stream, const T (&decay)[kQuad], const T (&r)[kQuad], const T (&v)[kQuad],
                         const Decay<T>& k) {
  T product = T(1), add = T(0);
  for (int j = kQuad - 1; j >= 0; --j) {
    add = decay[j] * add + k.add(r[j], v[j]);
    product *= decay[j];
  }
  map.decay = k.carry ? product : k.quad;  // k.quad is rounded only once
  map.add[stream] = add;
}

// Multiplies each lane's map by those of the following lanes.
template <typename T, int kStreams>
__device__ void scan_lanes(Map<T, kStreams>& map) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const T decay = __shfl_down_sync(kAll, map.decay, step);
    for (int s = 0; s < kStreams; ++s) {
      const T add = __shfl_down_sync(kAll, map.add[s], step);
      if (lane + step < 32) map.add[s] += map.decay * add;
    }
    if (lane + step < 32) map.decay *= decay;
  }
}

// handed: receives D to the right of this thread's tokens in each chunk; `maps` has the products of these tokens. state: D to the
// right of the team's tile before the call, and to the left of it afterwards.
template <bool kBlock, typename T, int kStreams, int kChunks>
__device__ void scan_tile(T (&handed)[kChunks][kStreams], double (&state)[kStreams], Map<T, kStreams> (&maps)[kChunks],
                          const Quad (&quads)[kChunks], int turn, const Decay<T>& k, const Team<kBlock>& team,
                          Chain<kStreams>& chain) {
  const int lane = threadIdx.x % 32;
  double decay[kChunks], add[kChunks][kStreams];  // of complete chunks
  for (int g = 0; g < kChunks; ++g) {
    scan_lanes(maps[g]);
    decay[g] = k.chunk;
    if (k.carry) {
      int count = __popc(quads[g].valid);
      for (int step = 16; step > 0; step /= 2) count += __shfl_xor_sync(kAll, count, step);
      decay[g] = power(k.exact, count);
    }
    for (int s = 0; s < kStreams; ++s) add[g][s] = double(__shfl_sync(kAll, maps[g].add[s], 0));
  }
  if (kBlock) {  // needed for D to the right of the warp (from the following warps) and to the left of the tile (from all)
    if (lane == 0) {
      double product = 1;
      for (int g = 0; g < kChunks; ++g) product *= decay[g];
      chain.decay[turn][team.warp] = product;
      for (int s = 0; s < kStreams; ++s) {
        double sum = 0;
        for (int g = kChunks - 1; g >= 0; --g) sum = add[g][s] + decay[g] * sum;
        chain.add[turn][s][team.warp] = sum;
      }
    }
    __syncthreads();
  }
  double in[kStreams];
  for (int s = 0; s < kStreams; ++s) in[s] = state[s];
  if (kBlock) {
    for (int w = team.warps - 1; w > team.warp; --w) {
      for (int s = 0; s < kStreams; ++s) in[s] = chain.add[turn][s][w] + chain.decay[turn][w] * in[s];
    }
    for (int s = 0; s < kStreams; ++s) state[s] = in[s];
    for (int w = team.warp; w >= 0; --w) {
      for (int s = 0; s < kStreams; ++s) state[s] = chain.add[turn][s][w] + chain.decay[turn][w] * state[s];
    }
  }
  for (int g = kChunks - 1; g >= 0; --g) {
    const T after = __shfl_down_sync(kAll, maps[g].decay, 1);
    for (int s = 0; s < kStreams; ++s) {
      const T right = __shfl_down_sync(kAll, maps[g].add[s], 1);
      handed[g][s] = lane == 31 ? T(in[s]) : right + after * T(in[s]);
      in[s] = add[g][s] + decay[g] * in[s];
    }
  }
  if (!kBlock) {
    for (int s = 0; s < kStreams; ++s) state[s] = in[s];
  }
}

// Writes zeros after the last offset.
template <typename T>
__device__ void zero_tail(T* to, const Rows& rows) {
  const int64_t apart = int64_t(gridDim.x) * blockDim.x;
  for (int64_t at = rows.covered() + int64_t(blockIdx.x) * blockDim.x + threadIdx.x; at < rows.tokens; at += apart) {
    to[at] = T(0);
  }
}

// How the rows are distributed in a launch. Without waiting for the device, the host knows only the mean length.
struct Shape {
  bool block;  // one block per row; else one warp per row
  int threads, blocks;

  // per_sm: blocks of kMaxThreads that run on a multiprocessor at once; further blocks would only wait.
  Shape(const Rows& rows, int per_sm) {
    const int64_t mean = rows.count > 0 ? rows.tokens / rows.count : 0;
    block = mean > 32 * kQuad;
    threads = kMaxThreads;
    while (block && threads > 64 && mean <= threads * kQuad) threads /= 2;  // two chunks per warp: 8 tokens per thread in a tile
    const int warps = threads / 32, each = block ? 1 : warps;
    const int64_t wanted = (rows.count + each - 1) / each;
    int device = 0, multiprocessors = 0;
    if (cudaGetDevice(&device) == cudaSuccess) {
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    }
    const int most = multiprocessors * per_sm * (kMaxWarps / warps);
    const int limit = most < 1 ? 1 : most < kMaxBlocks ? most : kMaxBlocks;
    blocks = int(wanted < 1 ? 1 : wanted < limit ? wanted : limit);
  }
};

// Whether 16-byte loads of these vectors are allowed (and 4-byte loads of the mask).
inline bool aligned(const Rows& rows, const void* const* vectors, int count) {
  uintptr_t bits = reinterpret_cast<uintptr_t>(rows.mask) & 3;
  for (int i = 0; i < count; ++i) bits |= reinterpret_cast<uintptr_t>(vectors[i]) & 15;
  return bits == 0;
}

// Launches kernel(arguments...) without waiting; returns nullptr or the driver's message.
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
