// Calls a kernel of the chosen instruction set with as many threads and as much scratch memory as it asks for.
#pragma once

#include <omp.h>

#include <cstddef>
#include <memory>
#include <new>

#include "dispatch.h"

namespace ssm_fast {

constexpr double kSerialWork = 3e4;  // below this many multiply-adds waking a second thread costs more

// Called once per Python thread: torch applies its thread count to OpenMP only when a thread first asks for it.
inline void (*on_new_thread)() = nullptr;

inline Index most_threads() {
  thread_local bool is_new = true;
  if (is_new && on_new_thread) on_new_thread();
  is_new = false;
  return omp_get_max_threads();
}

inline int threads_for(double work, Index parts) {
  if (work < kSerialWork || parts < 2 || omp_in_parallel()) return 1;
  const Index threads = most_threads();
  return int(threads < parts ? threads : parts);
}

// Memory from a cache line on, kept from call to call.
class Scratch {
 public:
  template <class T>
  T* get(Index elements) {
    const std::size_t bytes = std::size_t(elements) * sizeof(T);
    if (bytes > bytes_) {
      memory_.reset();
      bytes_ = 0;  // should there be no memory
      memory_.reset(::operator new(bytes, std::align_val_t{64}));
      bytes_ = bytes;
    }
    return static_cast<T*>(memory_.get());
  }

 private:
  struct Delete {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  std::unique_ptr<void, Delete> memory_;
  std::size_t bytes_ = 0;
};

// Calls a function of the chosen instruction set.
#if defined(SSM_FAST_HAS_avx512)
#define SSM_FAST_CALL(call) \
  (chosen_isa() == Isa::avx512 ? avx512::call : chosen_isa() == Isa::avx2 ? avx2::call : baseline::call)
#else
#define SSM_FAST_CALL(call) (baseline::call)
#endif

template <template <class> class Op, class T>
void launch(Op<T> p, Scratch& scratch) {
  const Cost cost = SSM_FAST_CALL(cost(p));
  p.threads = threads_for(cost.work, cost.parts);
  p.scratch = scratch.get<T>(cost.per_thread * p.threads + cost.shared);
  SSM_FAST_CALL(run(p));
}

}  // namespace ssm_fast
