// Definitions for all ops: the dtype tag, rows of tokens, the error convention. No torch, no Python.
//
// Error convention: a launcher returns nullptr, or a message in static memory (a literal); bindings.cpp raises it.
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

// Rows of flat tokens. Packed: row b is offsets[b] .. offsets[b + 1] and every token is valid; tokens after the last
// offset belong to no row. Padded: row b is b * width .. (b + 1) * width, and mask (1 byte per token) marks valid tokens.
struct Rows {
  const int32_t* offsets;  // [count + 1] or null
  const uint8_t* mask;     // [count * width] or null
  int64_t tokens;          // all positions, including those that belong to no row
  int64_t count;
  int64_t width;  // padded only

  SAFERLHF_BOTH int64_t begin(int64_t row) const { return offsets ? offsets[row] : row * width; }
  SAFERLHF_BOTH int64_t end(int64_t row) const { return offsets ? offsets[row + 1] : (row + 1) * width; }
  SAFERLHF_BOTH int64_t covered() const { return offsets ? offsets[count] : count * width; }
  bool valid(int64_t token) const { return mask == nullptr || mask[token] != 0; }
};

// Returns nullptr, or a message if the offsets would read or write outside the buffers.
const char* check_rows(const Rows& rows);

// Writes the number of valid tokens of each row to counts_B, of rows with a valid token to *sequences, and of all valid tokens
// to *tokens.
void count_valid(const Rows& rows, int64_t* counts_B, int64_t* sequences, int64_t* tokens);

// Asks the system for large pages for memory that will be written for the first time. For a new gradient of 100 MiB, page faults
// of 4 KiB each cost more than the arithmetic. It is a hint: systems without it ignore it.
void prefer_large_pages(void* memory, int64_t bytes);

}  // namespace saferlhf

// Compiles a function for AVX-512, AVX2 and plain x86-64; the loader chooses the version for the machine. Needs ifuncs (glibc).
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define SAFERLHF_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SAFERLHF_CLONES
#endif
#define SAFERLHF_INLINE inline __attribute__((always_inline))
#define SAFERLHF_INLINED __attribute__((always_inline))  // on a lambda
