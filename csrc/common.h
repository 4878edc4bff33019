// What every op shares: the dtype tag, rows of tokens, the error convention. No torch, no Python.
//
// Error convention: a launcher returns nullptr, or a message that lives for ever (a literal); bindings.cpp raises it.
// Argument order: outputs, inputs, sizes, scalars, then threads (CPU) or the stream (CUDA).
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define SAFERLHF_BOTH __host__ __device__
#else
#define SAFERLHF_BOTH
#endif

namespace saferlhf {

enum Dtype : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// Rows of flat tokens. Packed: row b is offsets[b] .. offsets[b + 1] and every token counts; what follows the last
// offset belongs to no row. Padded: row b is b * width .. (b + 1) * width and mask (1 byte each) says what counts.
struct Rows {
  const int32_t* offsets;  // [count + 1] or null
  const uint8_t* mask;     // [count * width] or null
  int64_t tokens;          // all positions, those that belong to no row included
  int64_t count;
  int64_t width;  // padded only

  SAFERLHF_BOTH int64_t begin(int64_t row) const { return offsets ? offsets[row] : row * width; }
  SAFERLHF_BOTH int64_t end(int64_t row) const { return offsets ? offsets[row + 1] : (row + 1) * width; }
  SAFERLHF_BOTH int64_t covered() const { return offsets ? offsets[count] : count * width; }
  bool valid(int64_t token) const { return mask == nullptr || mask[token] != 0; }
};

// nullptr, or what is wrong with the offsets: nothing may be read or written outside the buffers.
const char* check_rows(const Rows& rows);

// Valid tokens of each row into counts_B; how many rows have one into *sequences; all valid tokens into *tokens.
void count_valid(const Rows& rows, int64_t* counts_B, int64_t* sequences, int64_t* tokens);

// Asks the system for large pages under memory that is about to be written for the first time. A new gradient of 100 MiB costs
// more in page faults, 4 KiB each, than in arithmetic. A hint: nothing happens where it is not known.
void prefer_large_pages(void* memory, int64_t bytes);

}  // namespace saferlhf

// One function compiled for AVX-512, AVX2 and plain x86-64; the loader picks what the machine has. Needs ifuncs (glibc).
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define SAFERLHF_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SAFERLHF_CLONES
#endif
#define SAFERLHF_INLINE inline __attribute__((always_inline))
#define SAFERLHF_INLINED __attribute__((always_inline))  // on a lambda
