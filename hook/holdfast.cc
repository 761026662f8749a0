// The C ABI: checks what C cannot, keeps exceptions inside, and refuses to work in a forked child.
// Everything else is Job's.
//
// Forked children. A data loader inherits the job, but neither our threads nor our mappings
// (MADV_DONTFORK). A child is a new fork generation, counted by a pthread_atfork handler; a job
// belongs to the generation in which it was opened. A child may open a job of its own.
#include "hook/holdfast.h"

#include <pthread.h>
#include <sys/random.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <memory>
#include <new>

#include "hook/error.h"
#include "hook/job.h"
#include "hook/monitor_events.h"
#include "hook/process_monitor.h"
#include "hook/settings.h"
#include "hook/source_reader.h"

namespace {

using holdfast::hook::Deadline;
using holdfast::hook::Error;
using holdfast::hook::Job;
using holdfast::hook::MonitorEvents;
using holdfast::hook::Result;
using holdfast::hook::Settings;

// Process-wide by nature: how often this process's line was forked since the library was loaded.
std::atomic<uint32_t> fork_generation{0};
pthread_once_t atfork_once = PTHREAD_ONCE_INIT;

void CountFork() { fork_generation.fetch_add(1, std::memory_order_relaxed); }
void InstallForkHandler() { pthread_atfork(nullptr, nullptr, &CountFork); }

void WriteError(const Error& error, hf_error* target) {
  if (target == nullptr) return;
  target->code = error.code();
  std::memcpy(target->text, error.text(), std::strlen(error.text()) + 1);
}

// Runs the body, turns exceptions of ours (there is one: no memory) into an error, and reports.
template <typename Body>
hf_code Guarded(hf_error* error, const Body& body) {
  Error result;
  try {
    result = body();
  } catch (const std::bad_alloc&) {
    result = Error(HF_RESOURCE_EXHAUSTED, "out of memory in the training process");
  } catch (const std::exception& exception) {
    result = Error(HF_INTERNAL, "unexpected: %s", exception.what());
  }
  WriteError(result, error);
  return result.code();
}

// The caller's struct over the defaults, as far as the caller knows it.
template <typename T>
Error ReadOptions(const T* given, const char* what, T* options) {
  if (given == nullptr) return Error();
  if (given->struct_bytes < sizeof(size_t) || given->struct_bytes > sizeof(T)) {
    return Error(HF_INVALID_ARGUMENT, "%s.struct_bytes: expected %zu, found %zu", what, sizeof(T),
                 given->struct_bytes);
  }
  std::memcpy(options, given, given->struct_bytes);
  return Error();
}

template <typename T>
Error CheckResult(const T* target, const char* what) {
  if (target != nullptr && target->struct_bytes >= sizeof(size_t) &&
      target->struct_bytes <= sizeof(T)) {
    return Error();
  }
  return Error(HF_INVALID_ARGUMENT, "%s: expected a struct with struct_bytes = %zu", what,
               sizeof(T));
}

template <typename T>
void WriteResult(T value, T* target) {
  value.struct_bytes = target->struct_bytes;
  std::memcpy(target, &value, value.struct_bytes);
}

}  // namespace

struct hf_job {
  uint32_t generation;
  holdfast::hook::HostSourceReader reader;
  std::unique_ptr<Job> job;

  bool Usable() const { return generation == fork_generation.load(std::memory_order_relaxed); }
};

namespace {

Error CheckJob(const hf_job* job) {
  if (job == nullptr) return Error(HF_INVALID_ARGUMENT, "job is NULL");
  if (job->Usable()) return Error();
  return Error(HF_FAILED_PRECONDITION,
               "this process is a forked child of the one that opened the job");
}

// Where a heartbeat or a section is shown besides: on the board, if there is one. Without a job
// there is no other place, so one is made.
MonitorEvents* MonitorOf(const hf_job* job) {
  if (job != nullptr) return holdfast::hook::ProcessMonitor();
  try {
    return holdfast::hook::MakeProcessMonitor();
  } catch (const std::exception&) {
    return nullptr;  // no memory
  }
}

Error Open(const hf_open_options* given, hf_job** job) {
  hf_open_options options = HF_OPEN_OPTIONS_INIT;
  if (Error error = ReadOptions(given, "hf_open_options", &options); !error.ok()) return error;
  Result<Settings> settings = holdfast::hook::ReadSettings(options);
  if (!settings.ok()) return settings.error();
  pthread_once(&atfork_once, &InstallForkHandler);
  uint64_t seed = 0;
  if (getrandom(&seed, sizeof(seed), GRND_NONBLOCK) != sizeof(seed)) {
    seed = static_cast<uint64_t>(holdfast::hook::MonotonicNs());
  }
  holdfast::hook::SetMonitorIdentity(settings.value());
  auto opened = std::make_unique<hf_job>();
  opened->generation = fork_generation.load(std::memory_order_relaxed);
  Result<std::unique_ptr<Job>> made = Job::Open(settings.value(), &opened->reader, seed,
                                                Deadline::After(settings.value().deadline_ns));
  if (!made.ok()) return made.error();
  holdfast::hook::OfferProcessMonitor();
  opened->job = std::move(made.value());
  *job = opened.release();
  return Error();
}

}  // namespace

extern "C" {

hf_code hf_open(const hf_open_options* options, hf_job** job, hf_error* error) {
  return Guarded(error, [&]() -> Error {
    if (job == nullptr) return Error(HF_INVALID_ARGUMENT, "job is NULL");
    *job = nullptr;
    return Open(options, job);
  });
}

void hf_close(hf_job* job) {
  // In a forked child threads and mappings are not there to be torn down.
  if (job == nullptr || !job->Usable()) return;
  Guarded(nullptr, [&] {
    // Else a device may still write to memory that is the job's: it stays for the rest of the
    // process, as the pages themselves do.
    if (job->job->Close()) delete job;
    return Error();
  });
}

hf_code hf_register(hf_job* job, const char* layout_json, const hf_buffer* buffers,
                    size_t buffer_count, const hf_blob_slot* blobs, size_t blob_count,
                    int64_t deadline_ns, hf_error* error) {
  return Guarded(error, [&] {
    if (Error failed = CheckJob(job); !failed.ok()) return failed;
    if ((buffers == nullptr && buffer_count > 0) || (blobs == nullptr && blob_count > 0)) {
      return Error(HF_INVALID_ARGUMENT, "%s is NULL", buffers == nullptr ? "buffers" : "blobs");
    }
    return job->job->Register(layout_json, {buffers, buffer_count}, {blobs, blob_count},
                              Deadline::After(deadline_ns));
  });
}

int hf_due(hf_job* job, uint64_t step) {
  return job != nullptr && job->Usable() && job->job->Due(step) ? 1 : 0;
}

hf_code hf_save(hf_job* job, uint64_t step, const hf_save_options* options, hf_error* error) {
  return Guarded(error, [&] {
    if (Error failed = CheckJob(job); !failed.ok()) return failed;
    hf_save_options known = {};
    if (Error failed = ReadOptions(options, "hf_save_options", &known); !failed.ok()) {
      return failed;
    }
    if (known.blobs == nullptr && known.blob_count > 0) {
      return Error(HF_INVALID_ARGUMENT, "hf_save_options.blobs is NULL");
    }
    if (known.streams == nullptr && known.stream_count > 0) {
      return Error(HF_INVALID_ARGUMENT, "hf_save_options.streams is NULL");
    }
    return job->job->Save(step, known);
  });
}

hf_code hf_wait_captured(hf_job* job, int32_t group, int64_t deadline_ns, hf_error* error) {
  return Guarded(error, [&] {
    if (Error failed = CheckJob(job); !failed.ok()) return failed;
    return job->job->WaitCaptured(group, Deadline::After(deadline_ns));
  });
}

hf_code hf_wait_committed(hf_job* job, uint64_t step, uint32_t faults, int64_t deadline_ns,
                          hf_error* error) {
  return Guarded(error, [&] {
    if (Error failed = CheckJob(job); !failed.ok()) return failed;
    return job->job->WaitCommitted(step, faults, Deadline::After(deadline_ns));
  });
}

hf_code hf_restore(hf_job* job, hf_restore_result* result, int64_t deadline_ns, hf_error* error) {
  return hf_restore_partial(job, nullptr, result, deadline_ns, error);
}

hf_code hf_restore_partial(hf_job* job, const hf_restore_options* options,
                           hf_restore_result* result, int64_t deadline_ns, hf_error* error) {
  return Guarded(error, [&] {
    if (Error failed = CheckJob(job); !failed.ok()) return failed;
    hf_restore_options known = {};
    if (Error failed = ReadOptions(options, "hf_restore_options", &known); !failed.ok()) {
      return failed;
    }
    if (known.streams == nullptr && known.stream_count > 0) {
      return Error(HF_INVALID_ARGUMENT, "hf_restore_options.streams is NULL");
    }
    hf_restore_result restored = {};
    if (result != nullptr) {
      if (Error failed = CheckResult(result, "hf_restore_result"); !failed.ok()) return failed;
    }
    if (Error failed = job->job->Restore(known, &restored, Deadline::After(deadline_ns));
        !failed.ok()) {
      return failed;
    }
    if (result != nullptr) WriteResult(restored, result);
    return Error();
  });
}

hf_code hf_restored_blob(hf_job* job, const char* name, int64_t rank, const void** data,
                         uint64_t* bytes, hf_error* error) {
  return Guarded(error, [&] {
    if (Error failed = CheckJob(job); !failed.ok()) return failed;
    if (name == nullptr || data == nullptr || bytes == nullptr) {
      return Error(HF_INVALID_ARGUMENT, "name, data or bytes is NULL");
    }
    Result<std::span<const std::byte>> found = job->job->RestoredBlob(name, rank);
    if (!found.ok()) return found.error();
    *data = found.value().data();
    *bytes = found.value().size();
    return Error();
  });
}

hf_code hf_get_info(hf_job* job, hf_info* info) {
  return Guarded(nullptr, [&] {
    if (Error failed = CheckJob(job); !failed.ok()) return failed;
    if (Error failed = CheckResult(info, "hf_info"); !failed.ok()) return failed;
    hf_info filled = {};
    job->job->GetInfo(&filled);
    WriteResult(filled, info);
    return Error();
  });
}

hf_code hf_report(hf_job* job, uint64_t step, hf_save_report* report) {
  return Guarded(nullptr, [&] {
    if (Error failed = CheckJob(job); !failed.ok()) return failed;
    if (Error failed = CheckResult(report, "hf_save_report"); !failed.ok()) return failed;
    hf_save_report filled = {};
    if (Error failed = job->job->Report(step, &filled); !failed.ok()) return failed;
    WriteResult(filled, report);
    return Error();
  });
}

void hf_heartbeat(hf_job* job, uint64_t step) {
  if (MonitorEvents* const events = MonitorOf(job); events != nullptr) {
    events->board().StepDone(step);
  }
  if (job != nullptr && job->Usable()) job->job->Beat(step);
}

void hf_section_begin(hf_job* job, const char* name) {
  if (MonitorEvents* const events = MonitorOf(job); events != nullptr) {
    BeginMonitorSection(*events, name);
  }
  if (job != nullptr && job->Usable()) job->job->BeginSection(name);
}

void hf_section_end(hf_job* job) {
  if (MonitorEvents* const events = MonitorOf(job); events != nullptr) EndMonitorSection(*events);
  if (job != nullptr && job->Usable()) job->job->EndSection();
}

const char* hf_version(void) {
#define HF_TEXT(x) #x
#define HF_DOTTED(major, minor) HF_TEXT(major) "." HF_TEXT(minor) ".0"
  return HF_DOTTED(HF_VERSION_MAJOR, HF_VERSION_MINOR);
}

}  // extern "C"
