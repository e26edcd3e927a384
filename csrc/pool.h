// Threads to share one call's work: torch's own OpenMP pool where the process has one, otherwise a pool that sleeps when
// idle and survives fork().
#pragma once

#include <functional>

namespace dba {

// Runs job on the calling thread and on up to threads - 1 workers, and returns when all of them have returned from it.
// job must itself hand out the work (run_tasks does), because workers may come late or, when another thread is inside
// run_on_threads, not at all. Floating-point modes of the caller (flush to zero) do not reach job.
void run_on_threads(int threads, const std::function<void()>& job);

}  // namespace dba
