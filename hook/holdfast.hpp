// Holdfast's hook library for C++17: a thin, header-only layer over holdfast.h, which has the
// contracts. It adds ownership (Job closes itself), std::chrono, and lists that hold what a
// registration needs. It throws nothing of its own; failures are values.
//
//   auto opened = holdfast::Job::Open();
//   if (!opened.ok()) { train_without_checkpoints(opened.error().text()); }
//   holdfast::Job& job = opened.value();
//
//   holdfast::Registration registration;
//   registration.AddBuffer("param/wte", wte.data(), wte.size());
//   registration.AddBlob("rng", holdfast::Scope::kRank, 64);
//   job.Register(layout_json, registration, 60s);
#ifndef HOLDFAST_HPP_
#define HOLDFAST_HPP_

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "holdfast.h"

namespace holdfast {
inline namespace hook_v0 {

// OK, or a code and a text.
class [[nodiscard]] Error {
 public:
  Error() = default;
  Error(hf_code code, std::string text) : code_(code), text_(std::move(text)) {}
  bool ok() const { return code_ == HF_OK; }
  hf_code code() const { return code_; }
  const std::string& text() const { return text_; }

 private:
  hf_code code_ = HF_OK;
  std::string text_;
};

// A value, or why there is none. value() only after ok().
template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : value_(std::move(value)) {}
  Result(Error error) : error_(std::move(error)) {}
  bool ok() const { return value_.has_value(); }
  const Error& error() const { return error_; }
  T& value() { return *value_; }
  const T& value() const { return *value_; }

 private:
  std::optional<T> value_;
  Error error_;
};

enum class Scope { kGlobal = HF_BLOB_GLOBAL, kRank = HF_BLOB_RANK };

inline constexpr std::chrono::nanoseconds kForever{HF_FOREVER};

// The buffers and blobs of this rank. Names are copied; memory is only pointed to.
class Registration {
 public:
  // `count` elements of T. For void the count is in bytes.
  template <typename T>
  void AddBuffer(std::string name, T* data, std::size_t count, std::uint32_t group = 0) {
    std::uint64_t bytes = count;
    if constexpr (!std::is_void_v<T>) bytes *= sizeof(T);
    hf_buffer buffer = {};
    buffer.name = Keep(std::move(name));
    buffer.data = data;
    buffer.bytes = bytes;
    buffer.group = group;
    buffers_.push_back(buffer);
  }
  void AddBlob(std::string name, Scope scope, std::uint64_t capacity_bytes) {
    hf_blob_slot blob = {};
    blob.name = Keep(std::move(name));
    blob.scope = static_cast<hf_blob_scope>(scope);
    blob.capacity_bytes = capacity_bytes;
    blobs_.push_back(blob);
  }
  const std::vector<hf_buffer>& buffers() const { return buffers_; }
  const std::vector<hf_blob_slot>& blobs() const { return blobs_; }

 private:
  const char* Keep(std::string name) { return names_.emplace_back(std::move(name)).c_str(); }

  std::deque<std::string> names_;  // a deque: its elements stay where they are
  std::vector<hf_buffer> buffers_;
  std::vector<hf_blob_slot> blobs_;
};

// The blobs of one save. Names and bytes are pointed to until the save returns.
class Blobs {
 public:
  void Add(const char* name, const void* data, std::uint64_t bytes) {
    blobs_.push_back({name, data, bytes});
  }
  void Add(const char* name, const std::string& bytes) { Add(name, bytes.data(), bytes.size()); }
  void Add(const char* name, std::string&& bytes) = delete;  // would be gone before the save
  template <typename T, typename = std::enable_if_t<std::is_trivially_copyable_v<T>>>
  void AddValue(const char* name, const T& value) {
    Add(name, &value, sizeof(value));
  }
  template <typename T>
  void AddValue(const char* name, const T&& value) = delete;
  const std::vector<hf_blob>& list() const { return blobs_; }

 private:
  std::vector<hf_blob> blobs_;
};

// Bytes of a restored blob. Valid until the next Restore or the end of the job.
struct BlobView {
  const void* data;
  std::uint64_t bytes;
  std::string ToString() const {
    return bytes == 0 ? std::string() : std::string(static_cast<const char*>(data), bytes);
  }
  // The value, if the blob has exactly its size.
  template <typename T>
  std::optional<T> As() const {
    static_assert(std::is_trivially_copyable_v<T>);
    if (bytes != sizeof(T)) return std::nullopt;
    T value;
    std::memcpy(&value, data, sizeof(T));
    return value;
  }
};

// Threads and calls: as in holdfast.h.
class Job {
 public:
  static Result<Job> Open(const hf_open_options& options = HF_OPEN_OPTIONS_INIT) {
    hf_error error;
    hf_job* job = nullptr;
    if (hf_open(&options, &job, &error) != HF_OK) return ToError(error);
    return Job(job);
  }
  Job(Job&& other) noexcept : job_(std::exchange(other.job_, nullptr)) {}
  Job& operator=(Job&& other) noexcept {
    std::swap(job_, other.job_);
    return *this;
  }
  ~Job() { hf_close(job_); }
  hf_job* get() const { return job_; }

  Error Register(const std::string& layout_json, const Registration& registration,
                 std::chrono::nanoseconds deadline) {
    hf_error error;
    hf_register(job_, layout_json.c_str(), registration.buffers().data(),
                registration.buffers().size(), registration.blobs().data(),
                registration.blobs().size(), deadline.count(), &error);
    return ToError(error);
  }

  bool Due(std::uint64_t step) { return hf_due(job_, step) != 0; }

  // `wait`: for free image memory. Without it a save fails at once if there is none.
  Error Save(std::uint64_t step, const Blobs& blobs = {},
             std::chrono::nanoseconds wait = std::chrono::nanoseconds::zero()) {
    hf_save_options options = {};
    options.struct_bytes = sizeof(options);
    options.blobs = blobs.list().data();
    options.blob_count = blobs.list().size();
    options.wait_ns = wait.count();
    return Save(step, options);
  }
  Error Save(std::uint64_t step, const hf_save_options& options) {
    hf_error error;
    hf_save(job_, step, &options, &error);
    return ToError(error);
  }

  Error WaitCaptured(std::chrono::nanoseconds deadline) {
    return WaitGroupCaptured(HF_ALL_GROUPS, deadline);
  }
  Error WaitGroupCaptured(std::int32_t group, std::chrono::nanoseconds deadline) {
    hf_error error;
    hf_wait_captured(job_, group, deadline.count(), &error);
    return ToError(error);
  }
  Error WaitCommitted(std::uint64_t step, std::uint32_t faults, std::chrono::nanoseconds deadline) {
    hf_error error;
    hf_wait_committed(job_, step, faults, deadline.count(), &error);
    return ToError(error);
  }

  // HF_NOT_FOUND: no checkpoint yet.
  Result<hf_restore_result> Restore(std::chrono::nanoseconds deadline) {
    hf_error error;
    hf_restore_result result = {};
    result.struct_bytes = sizeof(result);
    if (hf_restore(job_, &result, deadline.count(), &error) != HF_OK) return ToError(error);
    return result;
  }
  // Some of it: patterns as in hf_restore_options; an empty list chooses everything of its kind.
  Result<hf_restore_result> Restore(const std::vector<std::string>& tensors,
                                    const std::vector<std::string>& states,
                                    std::chrono::nanoseconds deadline) {
    std::vector<const char*> tensor_list;
    for (const std::string& pattern : tensors) tensor_list.push_back(pattern.c_str());
    std::vector<const char*> state_list;
    for (const std::string& pattern : states) state_list.push_back(pattern.c_str());
    hf_restore_options options = {};
    options.struct_bytes = sizeof(options);
    options.tensors = tensor_list.data();
    options.tensor_count = tensor_list.size();
    options.states = state_list.data();
    options.state_count = state_list.size();
    hf_error error;
    hf_restore_result result = {};
    result.struct_bytes = sizeof(result);
    if (hf_restore_partial(job_, &options, &result, deadline.count(), &error) != HF_OK) {
      return ToError(error);
    }
    return result;
  }
  Result<BlobView> RestoredBlob(const std::string& name, std::int64_t rank = -1) {
    hf_error error;
    BlobView view = {};
    if (hf_restored_blob(job_, name.c_str(), rank, &view.data, &view.bytes, &error) != HF_OK) {
      return ToError(error);
    }
    return view;
  }

  hf_info Info() {
    hf_info info = {};
    info.struct_bytes = sizeof(info);
    hf_get_info(job_, &info);
    return info;
  }
  // Nothing if the save is too old, or there was none.
  std::optional<hf_save_report> Report(std::uint64_t step = HF_LAST_STEP) {
    hf_save_report report = {};
    report.struct_bytes = sizeof(report);
    if (hf_report(job_, step, &report) != HF_OK) return std::nullopt;
    return report;
  }

  void Heartbeat(std::uint64_t step) { hf_heartbeat(job_, step); }

 private:
  explicit Job(hf_job* job) : job_(job) {}
  static Error ToError(const hf_error& error) {
    return error.code == HF_OK ? Error() : Error(error.code, error.text);
  }

  hf_job* job_;
};

// How fast devices were copied from, over their bus, once the streams had come to the save; 0:
// nothing was.
inline double DeviceBytesPerSecond(const hf_save_report& report) {
  if (report.device_ns <= 0) return 0;
  return static_cast<double>(report.device_bytes) / static_cast<double>(report.device_ns) * 1e9;
}

// How much of the capture the loop did not wait for; 0: it is not over.
inline std::int64_t HiddenNs(const hf_save_report& report) {
  return report.capture_ns > report.blocked_ns ? report.capture_ns - report.blocked_ns : 0;
}

// Says what the loop is doing while it is in scope.
class Section {
 public:
  Section(Job& job, const char* name) : job_(job.get()) { hf_section_begin(job_, name); }
  ~Section() { hf_section_end(job_); }
  Section(const Section&) = delete;
  Section& operator=(const Section&) = delete;

 private:
  hf_job* job_;
};

// ---- Events for the monitor: holdfast.h has the contracts

// A communicator of this process, as long as the object lives.
class Communicator {
 public:
  Communicator(std::uint64_t id, const std::string& name, std::uint32_t ranks, std::uint32_t rank,
               std::uint32_t nodes = 0) {
    hf_communicator_options options = {};
    options.struct_bytes = sizeof(options);
    options.id = id;
    options.name = name.c_str();
    options.ranks = ranks;
    options.rank = rank;
    options.nodes = nodes;
    id_ = hf_monitor_communicator(&options);
  }
  ~Communicator() { hf_monitor_close(id_); }
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  // The calling thread moves its transfers.
  void MovedByThisThread() const { hf_monitor_thread(id_); }

  // Of holdfast.h's functions; 0: not watched.
  std::uint64_t id() const { return id_; }

 private:
  std::uint64_t id_ = 0;
};

// An operation from its enqueueing to its end.
class Operation {
 public:
  Operation(const Communicator& communicator, hf_operation kind, std::uint64_t bytes,
            std::uint32_t root_or_peer = 0)
      : id_(hf_operation_begin(communicator.id(), kind, bytes, root_or_peer)) {}
  ~Operation() { hf_operation_end(id_); }
  Operation(const Operation&) = delete;
  Operation& operator=(const Operation&) = delete;

  void Start() { hf_operation_start(id_); }
  std::uint64_t id() const { return id_; }

 private:
  std::uint64_t id_;
};

// A part of an operation over one connection.
class Transfer {
 public:
  enum class Direction { kReceive = 0, kSend = 1 };

  Transfer(const Communicator& communicator, const Operation& operation, std::uint32_t channel,
           std::uint32_t peer, Direction direction, std::uint32_t steps)
      : id_(hf_transfer_begin(communicator.id(), operation.id(), channel, peer,
                              static_cast<int>(direction), steps)) {}
  ~Transfer() { hf_transfer_end(id_); }
  Transfer(const Transfer&) = delete;
  Transfer& operator=(const Transfer&) = delete;

  // For hf_step_wait and hf_step_end.
  std::uint64_t BeginStep(std::uint32_t step) { return hf_step_begin(id_, step); }

 private:
  std::uint64_t id_;
};

}  // namespace hook_v0
}  // namespace holdfast

#endif  // HOLDFAST_HPP_
