#include "examples/tiny_lm/checkpointing.h"

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace tiny_lm {
namespace {

// Saves whose end has not been reported. The oldest is forgotten beyond that.
constexpr size_t kUnreportedMax = 16;

double Milliseconds(int64_t nanoseconds) { return static_cast<double>(nanoseconds) / 1e6; }

const char* Name(hf_save_state state) {
  switch (state) {
    case HF_SAVE_NONE:
      return "none";
    case HF_SAVE_CAPTURING:
      return "capturing";
    case HF_SAVE_CAPTURED:
      return "captured";
    case HF_SAVE_COMMITTED_PROCESS:
      return "committed_process";
    case HF_SAVE_COMMITTED_POWER:
      return "committed_power";
    case HF_SAVE_FAILED:
      return "failed";
  }
  return "unknown";
}

std::string Describe(const hf_save_report& report) {
  return absl::StrFormat(
      "\"step\":%d,\"state\":\"%s\",\"image_bytes\":%d,\"blocks\":%d,\"blocks_captured\":%d,"
      "\"blocks_flushed\":%d,\"call_us\":%.1f,\"blocked_ms\":%.3f,\"capture_ms\":%.3f,"
      "\"flush_ms\":%.3f,\"commit_ms\":%.3f,\"device_bytes\":%d,\"device_ms\":%.3f,\"error\":%s",
      report.step, Name(report.state), report.image_bytes, report.blocks, report.blocks_captured,
      report.blocks_flushed, static_cast<double>(report.call_ns) / 1e3,
      Milliseconds(report.blocked_ns), Milliseconds(report.capture_ns),
      Milliseconds(report.flush_ns), Milliseconds(report.commit_ns), report.device_bytes,
      Milliseconds(report.device_ns), JsonString(report.error.text));
}

}  // namespace

Checkpointing::Checkpointing(const CheckpointingOptions& options, void* stream, EventLog& log)
    : options_(options), stream_(stream), log_(log) {
  hf_open_options open = HF_OPEN_OPTIONS_INIT;
  hf_error error;
  if (hf_open(&open, &job_, &error) != HF_OK) PrintError("hf_open", error);
}

Checkpointing::~Checkpointing() { hf_close(job_); }

uint32_t Checkpointing::attempt() const {
  hf_info info{};
  info.struct_bytes = sizeof(info);
  return job_ != nullptr && hf_get_info(job_, &info) == HF_OK ? info.attempt : 0;
}

void Checkpointing::PrintError(const std::string& call, const hf_error& error) const {
  log_.Print("holdfast_error", absl::StrFormat("\"call\":\"%s\",\"code\":%d,\"text\":%s", call,
                                               error.code, JsonString(error.text)));
}

RestoreOutcome Checkpointing::RegisterAndRestore(const std::string& layout_document,
                                                 const std::vector<StateBuffer>& tensors,
                                                 const std::vector<BlobSlot>& blobs,
                                                 uint64_t& step) {
  if (job_ == nullptr) return RestoreOutcome::kNoHoldfast;
  std::vector<hf_buffer> buffers;
  for (const StateBuffer& tensor : tensors) {
    buffers.push_back({tensor.name.c_str(), tensor.data, tensor.bytes, tensor.group});
  }
  std::vector<hf_blob_slot> slots;
  for (const BlobSlot& blob : blobs) {
    slots.push_back(
        {blob.name.c_str(), blob.per_rank ? HF_BLOB_RANK : HF_BLOB_GLOBAL, blob.capacity_bytes});
  }
  hf_error error;
  if (hf_register(job_, layout_document.c_str(), buffers.data(), buffers.size(), slots.data(),
                  slots.size(), options_.restore_deadline_ns, &error) != HF_OK) {
    PrintError("hf_register", error);
    return RestoreOutcome::kNoHoldfast;
  }
  registered_ = true;
  hf_restore_result result{};
  result.struct_bytes = sizeof(result);
  // Everything, behind what the stream still does to the tensors. NULL is no stream.
  hf_restore_options restore{};
  restore.struct_bytes = sizeof(restore);
  restore.streams = &stream_;
  restore.stream_count = 1;
  const hf_code code =
      hf_restore_partial(job_, &restore, &result, options_.restore_deadline_ns, &error);
  if (code == HF_NOT_FOUND) {
    log_.Print("no_checkpoint", "");
    return RestoreOutcome::kNothing;
  }
  if (code != HF_OK) {
    PrintError("hf_restore", error);
    return RestoreOutcome::kFailed;
  }
  step = result.step;
  restored_world_size_ = result.world_size;
  log_.Print("restored",
             absl::StrFormat("\"step\":%d,\"checkpoint_attempt\":%d,\"world_size\":%d,"
                             "\"bytes\":%d,\"bytes_from_memory\":%d,\"ms\":%.3f",
                             result.step, result.attempt, result.world_size, result.bytes,
                             result.bytes_from_memory, Milliseconds(result.nanoseconds)));
  return RestoreOutcome::kRestored;
}

absl::StatusOr<std::string> Checkpointing::RestoredBlob(const std::string& name, int64_t old_rank) {
  const void* data = nullptr;
  uint64_t bytes = 0;
  hf_error error;
  if (hf_restored_blob(job_, name.c_str(), old_rank, &data, &bytes, &error) != HF_OK) {
    return absl::DataLossError(absl::StrFormat("blob '%s': %s", name, error.text));
  }
  return std::string(static_cast<const char*>(data), bytes);
}

bool Checkpointing::Due(uint64_t step) { return registered_ && hf_due(job_, step) != 0; }

bool Checkpointing::Save(uint64_t step, const std::vector<Blob>& blobs) {
  return SaveWithin(step, blobs, options_.save_wait_ns);
}

bool Checkpointing::SaveWithin(uint64_t step, const std::vector<Blob>& blobs, int64_t wait_ns) {
  if (!registered_) return false;
  std::vector<hf_blob> views;
  for (const Blob& blob : blobs) {
    views.push_back({blob.name.c_str(), blob.bytes.data(), blob.bytes.size()});
  }
  hf_save_options save{};
  save.struct_bytes = sizeof(save);
  save.blobs = views.data();
  save.blob_count = views.size();
  save.wait_ns = wait_ns;
  save.streams = &stream_;
  save.stream_count = 1;
  hf_error error;
  if (hf_save(job_, step, &save, &error) != HF_OK) {
    PrintError("hf_save", error);
    return false;
  }
  log_.Print("save_begun", absl::StrFormat("\"step\":%d", step));
  last_saved_step_ = step;
  unreported_.push_back(step);
  if (unreported_.size() > kUnreportedMax) unreported_.pop_front();
  return true;
}

void Checkpointing::WaitCaptured() {
  if (!registered_) return;
  hf_error error;
  const hf_code code = hf_wait_captured(job_, HF_ALL_GROUPS, options_.capture_deadline_ns, &error);
  // Without an agent there is nothing to wait for, and hf_save has said so already.
  if (code != HF_OK && code != HF_UNAVAILABLE) PrintError("hf_wait_captured", error);
}

bool Checkpointing::PrintReport(uint64_t step) const {
  hf_save_report report{};
  report.struct_bytes = sizeof(report);
  const hf_code code = hf_report(job_, step, &report);
  if (code == HF_UNAVAILABLE) return false;
  if (code == HF_OK && report.state != HF_SAVE_COMMITTED_POWER && report.state != HF_SAVE_FAILED) {
    return false;
  }
  if (code == HF_OK) log_.Print("save_ended", Describe(report));
  return true;
}

void Checkpointing::PrintReports() {
  if (!registered_) return;
  std::erase_if(unreported_, [this](uint64_t step) { return PrintReport(step); });
}

void Checkpointing::CommitLast(uint64_t step, const std::vector<Blob>& blobs) {
  if (!registered_) return;
  if (last_saved_step_ != step && !SaveWithin(step, blobs, options_.commit_deadline_ns)) return;
  WaitCaptured();
  hf_error error;
  if (hf_wait_committed(job_, step, HF_SURVIVE_POWER, options_.commit_deadline_ns, &error) ==
      HF_OK) {
    log_.Print("committed",
               absl::StrFormat("\"step\":%d,\"survives\":[\"process\",\"power\"]", step));
  } else {
    PrintError("hf_wait_committed", error);
  }
  PrintReports();
}

}  // namespace tiny_lm
