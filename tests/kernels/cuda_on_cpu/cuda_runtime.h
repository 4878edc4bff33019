// Enough of CUDA to run a kernel on the CPU, for tests of its logic where there is no GPU: blocks run one after another, the
// threads of a block are fibers, and each runs until it has to wait for its warp or its block. A warp runs ahead as far as it
// can before the next one starts, first to last or last to first (emulator_order): what a missing barrier would let happen
// does happen in one of the two. Threads that wait for what never comes are an error, not a hang.
//
// Left out: speed, weak memory order, blocks at the same time, everything that csrc/ does not use.
#pragma once

#include <csetjmp>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <ucontext.h>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;
inline int emulator_order = 0;  // 0: first block and warp first; 1: last first

namespace emulator {

constexpr size_t kStack = 1 << 16;
enum Wait { kNot, kWarp, kBlock };

struct Fiber {
  ucontext_t start;
  jmp_buf at;
  bool started = false, done = false;
  Wait wait = kNot;
  const char* call = nullptr;  // what it waits in
  unsigned turn = 0;
  unsigned char slot[2][8] = {};  // what it shows to its warp; two, since a lane may be one call ahead
  std::vector<char> stack = std::vector<char>(kStack);
};

inline std::vector<Fiber> fibers(1024);
inline jmp_buf scheduler;
inline unsigned current;
inline std::function<void()> body;
inline const char* error = nullptr;

inline void enter() {
  body();
  fibers[current].done = true;
  _longjmp(scheduler, 1);
}

inline void run(unsigned index) {
  current = index;
  threadIdx = dim3(index);
  Fiber& fiber = fibers[index];
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

inline void wait(Wait what, const char* call) {
  const unsigned me = current;
  fibers[me].wait = what;
  fibers[me].call = call;
  if (!_setjmp(fibers[me].at)) _longjmp(scheduler, 1);
}

// Runs a warp until all of it is done or waits for the block. False when lanes wait for different things.
inline bool run_warp(unsigned first) {
  for (;;) {
    for (unsigned i = first; i < first + 32; ++i) {
      if (!fibers[i].done && fibers[i].wait == kNot) run(i);
    }
    for (unsigned i = first + 1; i < first + 32; ++i) {
      if (fibers[i].done != fibers[first].done || fibers[i].wait != fibers[first].wait) return false;
      if (!fibers[i].done && std::strcmp(fibers[i].call, fibers[first].call) != 0) return false;
    }
    if (fibers[first].done || fibers[first].wait == kBlock) return true;
    for (unsigned i = first; i < first + 32; ++i) fibers[i].wait = kNot;
  }
}

inline bool run_block() {
  const unsigned warps = blockDim.x / 32;
  for (unsigned i = 0; i < blockDim.x; ++i) {
    Fiber& fiber = fibers[i];
    fiber.started = fiber.done = false;
    fiber.wait = kNot;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.data();
    fiber.start.uc_stack.ss_size = fiber.stack.size();
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, enter, 0);
  }
  for (;;) {
    for (unsigned w = 0; w < warps; ++w) {
      if (!run_warp((emulator_order ? warps - 1 - w : w) * 32)) return false;
    }
    for (unsigned w = 1; w < warps; ++w) {
      if (fibers[w * 32].done != fibers[0].done) return false;
    }
    if (fibers[0].done) return true;
    for (unsigned i = 0; i < blockDim.x; ++i) fibers[i].wait = kNot;
  }
}

// Every lane shows `x` and gets what lane `from(lane)` shows; its own where that is no lane.
template <class T, class From>
T exchange(T x, const char* call, From from) {
  static_assert(sizeof(T) <= 8, "what a shuffle moves");
  const unsigned me = current, turn = fibers[me].turn++ % 2;
  std::memcpy(fibers[me].slot[turn], &x, sizeof(T));
  wait(kWarp, call);
  const int lane = from(int(me % 32));
  if (lane >= 0 && lane < 32) std::memcpy(&x, fibers[me / 32 * 32 + lane].slot[turn], sizeof(T));
  return x;
}

}  // namespace emulator

template <class T>
T __shfl_sync(unsigned, T x, int source) {
  return emulator::exchange(x, "shfl", [=](int) { return source; });
}
template <class T>
T __shfl_down_sync(unsigned, T x, int step) {
  return emulator::exchange(x, "shfl_down", [=](int lane) { return lane + step; });
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int bits) {
  return emulator::exchange(x, "shfl_xor", [=](int lane) { return lane ^ bits; });
}
inline unsigned __ballot_sync(unsigned, int on) {
  const unsigned me = emulator::current, turn = emulator::fibers[me].turn % 2;
  emulator::exchange(on, "ballot", [](int lane) { return lane; });
  unsigned all = 0;
  for (int lane = 0; lane < 32; ++lane) {
    int theirs;
    std::memcpy(&theirs, emulator::fibers[me / 32 * 32 + lane].slot[turn], sizeof(int));
    all |= unsigned(theirs != 0) << lane;
  }
  return all;
}
inline void __syncwarp() { emulator::wait(emulator::kWarp, "syncwarp"); }
inline void __syncthreads() { emulator::wait(emulator::kBlock, "syncthreads"); }
inline void __threadfence() {}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
template <class T>
T __ldcg(const T* from) {
  return *from;
}
template <class T>
T atomicAdd(T* to, T x) {
  const T before = *to;
  *to += x;
  return before;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}

enum cudaError_t { cudaSuccess = 0, cudaErrorLaunchFailure = 719 };
typedef void* cudaStream_t;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 1, cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return emulator::error; }

template <class... Wanted, class... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Wanted...), Given&&... given) {
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  emulator::error = "a launch that no device takes";
  if (gridDim.x == 0 || blockDim.x == 0 || blockDim.x % 32 != 0 || blockDim.x > 1024) return cudaErrorLaunchFailure;
  emulator::body = [=]() { kernel(given...); };
  for (unsigned i = 0; i < gridDim.x; ++i) {
    blockIdx = dim3(emulator_order ? gridDim.x - 1 - i : i);
    emulator::error = "threads wait for others that do not come";
    if (!emulator::run_block()) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}
