// Row checks and counts; see common.h.
#include "common.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace saferlhf {

const char* check_rows(const Rows& rows) {
  if (rows.offsets == nullptr) {
    return rows.count * rows.width == rows.tokens ? nullptr : "rows * width is not the number of tokens";
  }
  if (rows.offsets[0] != 0) return "cu_seqlens: expected offsets that start at 0";
  for (int64_t row = 0; row < rows.count; ++row) {
    if (rows.offsets[row + 1] < rows.offsets[row]) return "cu_seqlens: expected offsets that never fall";
  }
  if (rows.offsets[rows.count] > rows.tokens) return "cu_seqlens: expected offsets that end at or before the last token";
  return nullptr;
}

void count_valid(const Rows& rows, int64_t* counts_B, int64_t* sequences, int64_t* tokens) {
  *sequences = 0;
  *tokens = 0;
  for (int64_t row = 0; row < rows.count; ++row) {
    int64_t valid = 0;
    if (rows.mask == nullptr) {
      valid = rows.end(row) - rows.begin(row);
    } else {
      for (int64_t at = rows.begin(row); at < rows.end(row); ++at) valid += rows.mask[at] != 0;
    }
    counts_B[row] = valid;
    *sequences += valid > 0;
    *tokens += valid;
  }
}

void prefer_large_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kLarge = std::uintptr_t(1) << 21;
  const std::uintptr_t start = reinterpret_cast<std::uintptr_t>(memory), from = (start + kLarge - 1) / kLarge * kLarge;
  const std::uintptr_t end = (start + std::uintptr_t(bytes)) / kLarge * kLarge;
  if (bytes >= int64_t(4 * kLarge) && end > from) madvise(reinterpret_cast<void*>(from), end - from, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace saferlhf
