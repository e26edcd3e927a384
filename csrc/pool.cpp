#include "pool.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace dba {
namespace {

// IEEE arithmetic with subnormals on every thread: torch.set_flush_denormal changes the calling thread alone, and the
// bits of a result must not depend on which thread computed it.
class DefaultFloatingPoint {
#if defined(__x86_64__)
    unsigned saved_ = _mm_getcsr();

public:
    DefaultFloatingPoint() { _mm_setcsr(0x1F80); }
    ~DefaultFloatingPoint() { _mm_setcsr(saved_); }
#else
public:
    DefaultFloatingPoint() {}
#endif
};

void run_here(const std::function<void()>& job) {
    DefaultFloatingPoint mode;
    job();
}

class Pool {
public:
    void run(int threads, const std::function<void()>& job) {
        std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
        if (!owner || threads <= 1) return run_here(job);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            for (; workers_ < threads - 1; ++workers_) std::thread(&Pool::work, this).detach();
            job_ = &job;
            seats_ = threads - 1;
            ++round_;
        }
        wake_.notify_all();
        run_here(job);
        std::unique_lock<std::mutex> lock(mutex_);
        seats_ = 0;  // whoever has not begun by now finds nothing to do
        done_.wait(lock, [this] { return running_ == 0; });
        job_ = nullptr;
    }

private:
    void work() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (unsigned long seen = 0;;) {
            wake_.wait(lock, [&] { return seats_ > 0 && round_ != seen; });
            seen = round_;
            --seats_;
            ++running_;
            const std::function<void()>& job = *job_;
            lock.unlock();
            run_here(job);
            lock.lock();
            if (--running_ == 0) done_.notify_one();
        }
    }

    std::mutex owner_;  // held by the thread inside run()
    std::mutex mutex_;  // guards everything below
    std::condition_variable wake_, done_;
    const std::function<void()>* job_ = nullptr;
    unsigned long round_ = 0;
    int workers_ = 0, seats_ = 0, running_ = 0;
};

std::atomic<Pool*> current{nullptr};
std::atomic<bool> forked{false};

// A child process has none of the threads and may have inherited locked mutexes: it forgets both pools and makes its own.
void forget_pools() {
    current.store(nullptr);
    forked.store(true);
}
const int registered = pthread_atfork(nullptr, nullptr, forget_pools);

// The entry point of the OpenMP runtime that torch has loaded; null without one. Its threads spin for milliseconds after
// torch's last parallel loop, and threads of our own would share the cores with them. A region entered from several
// threads at once has a team for each. ThreadSanitizer cannot see into the runtime.
using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
Parallel openmp_parallel() {
#if defined(__SANITIZE_THREAD__)
    return nullptr;
#else
    static const Parallel found = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return found;
#endif
}

// Never deleted: workers sleep in it until the process ends.
Pool& pool() {
    Pool* known = current.load();
    if (known) return *known;
    Pool* made = new Pool;
    if (current.compare_exchange_strong(known, made)) return *made;
    delete made;
    return *known;
}

}  // namespace

void run_on_threads(int threads, const std::function<void()>& job) {
    const Parallel openmp = forked.load() ? nullptr : openmp_parallel();
    if (!openmp || threads <= 1) return pool().run(threads, job);
    auto call = [](void* data) { run_here(*static_cast<const std::function<void()>*>(data)); };
    openmp(call, const_cast<std::function<void()>*>(&job), static_cast<unsigned>(threads), 0);
}

}  // namespace dba
