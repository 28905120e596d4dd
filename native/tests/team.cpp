// The part of GCC's OpenMP interface that the library uses, on plain threads and locks, all of which a thread sanitizer sees; the
// system's libgomp is not compiled for one, so its barriers are unknown to it and every loop would be reported.
// Function names and argument orders are those of GCC 9 and later (libgomp/libgomp_g.h, libgomp.map); static schedules are compiled
// into the callers and need the two omp_ functions only.  Every iteration of a dynamic loop is handed out by itself.
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace {

// A loop that a team shares: threads come to their loops in the same order, so the number of a loop names it.
struct Loop {
  unsigned long long next, end;
  int left = 0;  // threads that are done with it
};

struct Team {
  explicit Team(int size) : size(size) {}
  const int size;
  std::mutex lock;
  std::condition_variable changed;
  int waiting = 0;
  long phase = 0;
  std::vector<Loop> loops;  // all that anyone has come to, in order

  void barrier() {
    std::unique_lock<std::mutex> held(lock);
    const long mine = phase;
    if (++waiting == size) {
      waiting = 0;
      ++phase;
      changed.notify_all();
    }
    changed.wait(held, [&] { return phase != mine; });
  }
};

thread_local Team* team = nullptr;
thread_local int number = 0;
thread_local size_t loops_begun = 0;

void member(Team* of, int as, void (*function)(void*), void* data) {
  Team* const before = team;
  const int number_before = number;
  const size_t loops_before = loops_begun;
  team = of;
  number = as;
  loops_begun = 0;
  function(data);
  team = before;
  number = number_before;
  loops_begun = loops_before;
}

bool take(unsigned long long* first, unsigned long long* last) {
  std::lock_guard<std::mutex> held(team->lock);
  Loop& loop = team->loops[loops_begun - 1];
  if (loop.next >= loop.end) return false;
  *first = loop.next++;
  *last = *first + 1;
  return true;
}

bool begin(unsigned long long start, unsigned long long end, unsigned long long* first, unsigned long long* last) {
  static Team alone(1);  // a loop outside of every region
  if (team == nullptr) team = &alone;
  {
    std::lock_guard<std::mutex> held(team->lock);
    if (++loops_begun > team->loops.size()) team->loops.push_back({start, end});
  }
  return take(first, last);
}

}  // namespace

extern "C" {

int omp_get_thread_num() { return number; }
int omp_get_num_threads() { return team ? team->size : 1; }

void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned) {
  if (threads == 0) threads = 2;
  Team of(team == nullptr ? int(threads) : 1);  // regions inside of regions have one thread, as in libgomp
  std::vector<std::thread> others;
  for (int i = 1; i < of.size; ++i) others.emplace_back(member, &of, i, function, data);
  member(&of, 0, function, data);
  for (std::thread& other : others) other.join();
}

void GOMP_barrier() {
  if (team) team->barrier();
}

bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long, long, long* first, long* last) {
  return begin((unsigned long long)start, (unsigned long long)(end > start ? end : start), (unsigned long long*)first, (unsigned long long*)last);
}
bool GOMP_loop_nonmonotonic_dynamic_next(long* first, long* last) { return take((unsigned long long*)first, (unsigned long long*)last); }

bool GOMP_loop_ull_nonmonotonic_dynamic_start(bool, unsigned long long start, unsigned long long end, unsigned long long, unsigned long long, unsigned long long* first,
                                              unsigned long long* last) {
  return begin(start, end, first, last);
}
bool GOMP_loop_ull_nonmonotonic_dynamic_next(unsigned long long* first, unsigned long long* last) { return take(first, last); }

void GOMP_loop_end() { GOMP_barrier(); }
void GOMP_loop_end_nowait() {}
}
