// What every call of a kernel needs: the chosen instruction set, threads and scratch memory.
#pragma once

#include <omp.h>

#include <cstddef>
#include <memory>
#include <new>

#include "dispatch.h"

namespace ssm_fast {

constexpr double kSerialWork = 3e4;  // below this many multiply-adds waking a second thread costs more
constexpr Index kLinearRows = 96;    // rows of a linear call that are worth a thread

// torch sets OpenMP's number of threads in a thread of Python when it is first asked for it there: what asks it.
inline void (*on_new_thread)() = nullptr;

inline Index most_threads() {
  thread_local bool is_new = true;
  if (is_new && on_new_thread) on_new_thread();
  is_new = false;
  return omp_get_max_threads();
}

inline int threads_for(double work, Index rows) {
  if (work < kSerialWork || omp_in_parallel()) return 1;
  const Index threads = most_threads();
  return int(threads < rows ? threads : (rows < 1 ? 1 : rows));
}

// Threads of a linear call: each has a workspace, so no more than there are blocks worth one.
inline int linear_threads(Index rows, double weights) {
  return threads_for(double(rows) * weights, (rows + kLinearRows - 1) / kLinearRows);
}

struct AlignedDelete {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
};

// An aligned block for `elements` values that a kernel works in.
template <class T>
std::unique_ptr<void, AlignedDelete> scratch_block(Index elements) {
  return std::unique_ptr<void, AlignedDelete>(::operator new(std::size_t(elements) * sizeof(T), std::align_val_t{64}));
}

// Calls a function of the chosen instruction set.
#if defined(SSM_FAST_HAS_avx512)
#define SSM_FAST_CALL(call) \
  (chosen_isa() == Isa::avx512 ? avx512::call : chosen_isa() == Isa::avx2 ? avx2::call : baseline::call)
#else
#define SSM_FAST_CALL(call) (baseline::call)
#endif

}  // namespace ssm_fast
