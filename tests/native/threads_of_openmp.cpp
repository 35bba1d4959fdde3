// The part of libgomp that the kernels use, over std::thread, for ThreadSanitizer.
//
// libgomp itself is not instrumented: ThreadSanitizer does not see that it starts and joins its threads and reports
// races that are none. A construct of OpenMP beyond these is an undefined symbol when exercise_kernels is linked.
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace {

struct Team {
  unsigned size;
  std::mutex mutex;
  std::condition_variable all_here;
  unsigned waiting = 0, barriers_passed = 0;
};

thread_local Team* team = nullptr;  // null outside of parallel regions
thread_local unsigned number = 0;

void run_as(Team* of, unsigned as, void (*body)(void*), void* data) {
  team = of;
  number = as;
  body(data);
}

}  // namespace

extern "C" {

int omp_get_thread_num() { return int(number); }
int omp_get_num_threads() { return team ? int(team->size) : 1; }

void GOMP_parallel(void (*body)(void*), void* data, unsigned num_threads, unsigned) {
  Team* const outer_team = team;
  const unsigned outer_number = number;
  Team inner{num_threads, {}, {}};
  std::vector<std::thread> threads;
  for (unsigned i = 1; i < num_threads; ++i) threads.emplace_back(run_as, &inner, i, body, data);
  run_as(&inner, 0, body, data);
  for (std::thread& thread : threads) thread.join();
  team = outer_team;
  number = outer_number;
}

void GOMP_barrier() {
  if (!team) return;
  std::unique_lock<std::mutex> lock(team->mutex);
  const unsigned barrier = team->barriers_passed;
  if (++team->waiting == team->size) {
    team->waiting = 0;
    ++team->barriers_passed;
    team->all_here.notify_all();
  } else {
    team->all_here.wait(lock, [barrier] { return team->barriers_passed != barrier; });
  }
}

}  // extern "C"
