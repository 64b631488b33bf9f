// Huge pages for large blocks of fresh memory.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>

namespace maskmoe {

// Asks for pages of 2 MiB under `bytes` of memory that has not been touched yet. The system
// provides each page on the first access, by an interrupt, and fills it with zeros; at 4 KiB a page
// that takes longer than many layers do. Only for blocks so large that malloc maps each by itself,
// anew on every call; smaller blocks lie in the heap, which keeps its pages.
inline void advise_huge_pages(void* from, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr int64_t kMapped = int64_t{32} << 20;
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  if (bytes < kMapped) return;
  const auto at = reinterpret_cast<uintptr_t>(from);
  const uintptr_t begin = (at + kPage - 1) / kPage * kPage;
  const uintptr_t end = (at + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // only a hint: it may fail
#else
  (void)from;
  (void)bytes;
#endif
}

}  // namespace maskmoe
