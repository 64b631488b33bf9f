// Large blocks of fresh memory.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>

namespace maskmoe {

// Asks for pages of 2 MiB under `bytes` of memory that nobody touched yet. The system hands over
// each page with an interrupt and filled with zeros; at 4 KiB a page that takes longer than many a
// layer. Only for what malloc maps by itself, on every call anew; smaller blocks lie in a heap
// that others share and that keeps its pages.
inline void prefer_large_pages(void* from, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr int64_t kMapped = int64_t{32} << 20;
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  if (bytes < kMapped) return;
  const auto at = reinterpret_cast<uintptr_t>(from);
  const uintptr_t begin = (at + kPage - 1) / kPage * kPage;
  const uintptr_t end = (at + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a wish: it may fail
#else
  (void)from;
  (void)bytes;
#endif
}

}  // namespace maskmoe
