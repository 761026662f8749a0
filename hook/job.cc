#include "hook/job.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "hook/private_agent.h"
#include "hook/process_monitor.h"

namespace holdfast::hook {
namespace {

// A sleep for the agent's events ends after so long, to look at the connection and for a grant that
// nobody announced.
constexpr int64_t kLookNs = 50 * kNsPerMs;

constexpr uint32_t kKnownFaults = HF_SURVIVE_PROCESS | HF_SURVIVE_POWER;

unsigned long long Print(uint64_t value) { return value; }

template <size_t N>
void CopyText(char (&target)[N], const std::string& text) {
  const size_t kept = std::min(text.size(), N - 1);
  std::memcpy(target, text.data(), kept);
  target[kept] = '\0';
}

abi::OpenRequest MakeOpenRequest(const Settings& settings) {
  abi::OpenRequest request = {};
  CopyText(request.job, settings.job);
  CopyText(request.attempt_key, settings.attempt_key);
  CopyText(request.root, settings.root);
  CopyText(request.restore_from, settings.restore_from);
  char node[sizeof(request.node)] = {};
  // For people only: an unknown host name stays empty.
  if (gethostname(node, sizeof(node) - 1) == 0) CopyText(request.node, node);
  request.rank = settings.rank;
  request.world_size = settings.world_size;
  request.local_rank = settings.local_rank;
  return request;
}

Error Fenced(uint32_t by) {
  if (by == abi::kJobReplaced) {
    return Error(HF_FAILED_PRECONDITION,
                 "the job's directory was replaced: this run publishes nothing more");
  }
  return Error(HF_FAILED_PRECONDITION,
               "attempt %u of the job has begun: this older one publishes nothing more", by);
}

// Copies `bytes` from `source` to the image of the slot, at `image_offset`; blocks need not lie
// side by side.
bool WriteToImage(const Registration& registration, uint32_t slot, uint64_t image_offset,
                  const std::byte* source, uint64_t bytes) {
  const uint64_t block_bytes = registration.block_bytes();
  while (bytes > 0) {
    const uint64_t in_block = image_offset % block_bytes;
    const uint64_t piece = std::min(bytes, block_bytes - in_block);
    std::byte* const block =
        registration.BlockData(slot, static_cast<uint32_t>(image_offset / block_bytes));
    if (block == nullptr) return false;
    std::memcpy(block + in_block, source, piece);
    image_offset += piece;
    source += piece;
    bytes -= piece;
  }
  return true;
}

// Gives a claimed slot back as it was granted.
void Unclaim(const Registration& registration, uint32_t slot) {
  registration.slot(slot).state.store(abi::SlotState::kGranted, std::memory_order_release);
}

}  // namespace

Result<std::unique_ptr<Job>> Job::Open(const Settings& settings, SourceReader* reader,
                                       uint64_t seed, Deadline deadline) {
  std::unique_ptr<Job> job(new Job(settings, reader, seed));
  Result<UniqueFd> doorbell = MakeEventFd();
  if (!doorbell.ok()) return doorbell.error();
  job->doorbell_ = std::move(doorbell.value());
  Capture::Options capture_options;
  capture_options.thread_count = settings.copy_threads;
  capture_options.doorbell_fd = job->doorbell_.get();
  capture_options.head_start_ns = settings.capture_head_start_ns;
  capture_options.check_source = settings.check_source;
  capture_options.check_seed = seed + 1;
  capture_options.device_bytes_per_second_max = settings.device_bytes_per_second_max;
  Result<std::unique_ptr<Capture>> capture = Capture::Start(capture_options, reader);
  if (!capture.ok()) return capture.error();
  job->capture_ = std::move(capture.value());

  LinkOptions options;
  options.socket_path = settings.socket_path;
  options.open = MakeOpenRequest(settings);
  options.doorbell_fd = job->doorbell_.get();
  options.connect_first = [settings](Deadline connect_deadline) {
    return ConnectOrStartAgent(settings, connect_deadline);
  };
  options.on_session = [unowned = job.get()](Link& link) {
    unowned->heartbeat_.Rewrite(link.page());
    Result<std::shared_ptr<Registration>> registration = link.registration();
    if (registration.ok()) unowned->capture_->Populate(std::move(registration.value()));
    OfferProcessMonitor();  // a worker that was restarted does not have it
  };
  Result<std::unique_ptr<Link>> link = Link::Open(std::move(options), deadline);
  if (!link.ok()) return link.error();
  job->link_ = std::move(link.value());
  job->due_every_steps_ = job->link_->page().due_every_steps;
  return job;
}

Job::~Job() { Close(); }

bool Job::Close() {
  if (capture_ == nullptr) return true;
  if (capture_->running()) {
    // The image is void if this fails, which is all that can be done about it.
    (void)WaitCaptured(HF_ALL_GROUPS, Deadline::After(kCloseCaptureNs));
  }
  link_.reset();
  return capture_->Stop(Deadline::After(kDrainNs));
}

Error Job::Register(const char* layout_json, std::span<const hf_buffer> buffers,
                    std::span<const hf_blob_slot> blobs, Deadline deadline) {
  const HeldUp held(this);
  if (capture_->running()) {
    return Error(HF_FAILED_PRECONDITION,
                 "the capture of step %llu has not been waited for (hf_wait_captured)",
                 Print(current().step));
  }
  Result<std::shared_ptr<const Document>> document =
      Document::Make(layout_json, buffers, blobs, settings_.copies);
  if (!document.ok()) return document.error();
  captured_registration_.reset();
  snapshot_ = Link::Snapshot();
  capture_->Release();
  if (Error error = link_->Register(std::move(document.value()), deadline); !error.ok()) {
    return error;
  }
  // Here, so that hf_save need not.
  if (Fresh().registration != nullptr) capture_->Populate(snapshot_.registration);
  return Error();
}

// Of nothing that one rank could see earlier than another: not of the connection, nor of a fence.
// What the agent wants besides, it wants of a step that no rank has come to yet.
bool Job::Due(uint64_t step) {
  if (step == 0) return false;
  abi::RankPage& page = link_->page();
  page.due_asked_step.store(step, std::memory_order_seq_cst);
  const uint64_t wanted_step = page.due_step.load(std::memory_order_seq_cst);
  if (wanted_step != due_wanted_step_ && step >= wanted_step) {
    due_wanted_step_ = wanted_step;
    due_granted_step_ = step;  // also if it is asked for again
  }
  const bool is_wanted = wanted_step != 0 && step == due_granted_step_;
  return is_wanted || (due_every_steps_ != 0 && step % due_every_steps_ == 0);
}

// ---- Save

const Link::Snapshot& Job::Fresh() {
  if (snapshot_.version != link_->version()) snapshot_ = link_->snapshot();
  return snapshot_;
}

Error Job::CheckMaySave(uint64_t step) {
  if (capture_->running()) {
    return Error(HF_FAILED_PRECONDITION,
                 "save of step %llu: the last capture has not been waited for (hf_wait_captured)",
                 Print(step));
  }
  if (step == abi::kNoStep) {
    return Error(HF_INVALID_ARGUMENT, "save: UINT64_MAX is not a step");
  }
  if (capture_->draining()) {
    return Error(HF_UNAVAILABLE,
                 "save of step %llu: a device has not finished the copies of the capture before, "
                 "which was given up",
                 Print(step));
  }
  if (!Fresh().ready) {
    if (Error error = link_->Reachable(); !error.ok()) return error;
  }
  if (snapshot_.registration == nullptr) return snapshot_.registration_error;
  const abi::RankPage& page = link_->page();
  const uint32_t fenced_by = page.fenced_by.load(std::memory_order_acquire);
  if (fenced_by != 0) return Fenced(fenced_by);
  const std::optional<AgentReport> report = FindReport(page, step);
  const SaveRecord* record = FindRecord(step);
  const bool begun_here = record != nullptr && record->session_id == snapshot_.session.id;
  // Also what has failed: other ranks may have given that step up, and go on.
  if (report.has_value() || begun_here) {
    return Error(HF_ALREADY_EXISTS,
                 "step %llu has been saved, or tried, by this attempt: a step is not saved twice",
                 Print(step));
  }
  return Error();
}

Error Job::CheckBlobs(const Registration& registration, uint64_t step,
                      std::span<const hf_blob> blobs) const {
  for (const hf_blob& blob : blobs) {
    if (blob.name == nullptr) {
      return Error(HF_INVALID_ARGUMENT, "save of step %llu: a blob has no name", Print(step));
    }
    const int64_t index = registration.document().FindBlob(blob.name);
    if (index < 0) {
      return Error(HF_INVALID_ARGUMENT, "save of step %llu: blob '%s' is not registered",
                   Print(step), ShortName(blob.name).text());
    }
    const uint64_t capacity = registration.document().blobs()[index].capacity_bytes;
    if (blob.bytes > capacity) {
      return Error(HF_INVALID_ARGUMENT,
                   "save of step %llu: blob '%s': expected at most %llu bytes, found %llu",
                   Print(step), ShortName(blob.name).text(), Print(capacity), Print(blob.bytes));
    }
    if (blob.data == nullptr && blob.bytes > 0) {
      return Error(HF_INVALID_ARGUMENT, "save of step %llu: blob '%s' of %llu bytes: data is NULL",
                   Print(step), ShortName(blob.name).text(), Print(blob.bytes));
    }
  }
  return Error();
}

Error Job::SetPointers(Registration& registration, void* const* pointers) const {
  const std::vector<Document::Buffer>& buffers = registration.document().buffers();
  std::vector<const void*>& used = registration.pointers();
  for (size_t i = 0; i < buffers.size(); ++i) {
    used[i] = pointers == nullptr ? buffers[i].data : pointers[i];
    if (used[i] == nullptr && buffers[i].bytes > 0) {
      return Error(HF_INVALID_ARGUMENT, "pointer %zu, of buffer '%s' of %llu bytes, is NULL", i,
                   ShortName(buffers[i].name).text(), Print(buffers[i].bytes));
    }
  }
  return Error();
}

// A slot whose blocks are free and all in the memory, claimed: the agent leaves it alone.
// HF_ABORTED: the registration is another one now, and none of this will be granted any more.
Result<uint32_t> Job::ClaimGrantedSlot(const Registration& registration, uint64_t step,
                                       Deadline deadline) {
  for (;;) {
    if (Fresh().ready && snapshot_.registration.get() != &registration) {
      return Error(HF_ABORTED, "a new agent has another registration");
    }
    abi::RankPage& page = link_->page();
    const uint32_t events = page.agent_events.load(std::memory_order_acquire);
    for (uint32_t slot = 0; slot < registration.slot_count(); ++slot) {
      // Pairs with the agent's release: its block table and cleared block_done are there.
      abi::SlotState expected = abi::SlotState::kGranted;
      if (!registration.slot(slot).state.compare_exchange_strong(expected, abi::SlotState::kClaimed,
                                                                 std::memory_order_acquire,
                                                                 std::memory_order_relaxed)) {
        continue;
      }
      for (uint32_t block = 0; block < registration.block_count(); ++block) {
        if (registration.BlockData(slot, block) == nullptr) {
          Unclaim(registration, slot);
          return Error(HF_INTERNAL, "image slot %u: block %u is not in the rank's memory", slot,
                       block);
        }
      }
      return slot;
    }
    if (deadline.passed()) {
      return Error(HF_RESOURCE_EXHAUSTED,
                   "save of step %llu: no free image of %llu bytes: earlier ones are still being "
                   "flushed, a restore was left a moment ago, or the agent's memory budget is too "
                   "small",
                   Print(step), Print(registration.image_bytes()));
    }
    if (Error error = link_->WorthWaiting(); !error.ok()) return error;
    FutexWait(page.agent_events, events, deadline.Earlier(Deadline::After(kLookNs)),
              FutexScope::kShared);
  }
}

Error Job::WriteBlobs(const Registration& registration, uint32_t slot,
                      std::span<const hf_blob> blobs) const {
  constexpr uint64_t kNotGiven = UINT64_MAX;
  const uint32_t count = static_cast<uint32_t>(registration.document().blobs().size());
  for (uint32_t i = 0; i < count; ++i) registration.blob_bytes(slot, i) = kNotGiven;
  for (const hf_blob& blob : blobs) {
    const uint32_t index = static_cast<uint32_t>(registration.document().FindBlob(blob.name));
    const abi::BlobArea& area = registration.blob_areas()[index];
    // A global blob is stored by rank 0 only.
    if (area.image_offset == UINT64_MAX) continue;
    if (registration.blob_bytes(slot, index) != kNotGiven) {
      return Error(HF_INVALID_ARGUMENT, "blob '%s' is given twice", ShortName(blob.name).text());
    }
    if (blob.bytes > area.capacity_bytes ||
        !WriteToImage(registration, slot, area.image_offset,
                      static_cast<const std::byte*>(blob.data), blob.bytes)) {
      return Error(HF_INTERNAL, "blob '%s': the agent's area for it has %llu bytes, expected %llu",
                   ShortName(blob.name).text(), Print(area.capacity_bytes), Print(blob.bytes));
    }
    registration.blob_bytes(slot, index) = blob.bytes;
  }
  return Error();
}

Error Job::Save(uint64_t step, const hf_save_options& options) {
  const HeldUp held(this);
  const int64_t called_ns = MonotonicNs();
  const Deadline deadline = Deadline::After(options.wait_ns);
  const std::span<const hf_blob> blobs(options.blobs, options.blob_count);
  std::shared_ptr<Registration> registration;
  Result<uint32_t> slot = Error(HF_ABORTED, "not asked for yet");
  // An agent that has died with its keeper takes the images that were waited for with it; the next
  // one grants its own.
  while (!slot.ok() && slot.error().code() == HF_ABORTED) {
    if (Error error = CheckMaySave(step); !error.ok()) return error;
    registration = snapshot_.registration;
    if (Error error = CheckBlobs(*registration, step, blobs); !error.ok()) return error;
    if (Error error = SetPointers(*registration, options.pointers); !error.ok()) return error;
    slot = ClaimGrantedSlot(*registration, step, deadline);
  }
  if (!slot.ok()) return slot.error();
  if (Error error = WriteBlobs(*registration, slot.value(), blobs); !error.ok()) {
    Unclaim(*registration, slot.value());
    return error;
  }
  if (const DeviceTable* const devices = registration->document().devices().get();
      devices != nullptr) {
    if (Error error = devices->RecordGates({options.streams, options.stream_count}); !error.ok()) {
      Unclaim(*registration, slot.value());
      return Error(error.code(), "save of step %llu: %s", Print(step), error.text());
    }
  }

  abi::ImageSlot& image = registration->slot(slot.value());
  image.step.store(step, std::memory_order_relaxed);
  image.save_ns.store(called_ns, std::memory_order_relaxed);
  ++record_count_;
  SaveRecord& record = current();
  record = SaveRecord();
  record.step = step;
  record.session_id = snapshot_.session.id;
  record.state = HF_SAVE_CAPTURING;
  record.image_bytes = registration->image_bytes();
  record.blocks = registration->block_count();
  record.block_bytes = registration->block_bytes();
  record.begun_ns = called_ns;
  captured_registration_ = registration;
  captured_slot_ = slot.value();
  unwaited_groups_ = registration->groups();
  // Where nothing is read from tensors, there is nothing to compare and nothing to wait for.
  const bool compares = checker_.mode() != CheckSource::kNone && unwaited_groups_ != 0;
  image.must_compare.store(compares && checker_.mode() == CheckSource::kAll ? 1 : 0,
                           std::memory_order_relaxed);
  capture_->Begin(registration, slot.value(), compares ? SealBy::kTrainer : SealBy::kCopier);
  if (unwaited_groups_ == 0) CaptureSucceeded();
  record.call_ns = MonotonicNs() - called_ns;
  return Error();
}

// ---- Waiting

Error Job::CaptureFailed(const Error& error) {
  SaveRecord& record = current();
  record.state = HF_SAVE_FAILED;
  record.blocks_captured = capture_->blocks_done();
  record.device = capture_->device_copies();
  record.error = error;
  capture_->Void(error);
  return error;
}

void Job::CaptureSucceeded() {
  SaveRecord& record = current();
  const abi::ImageSlot& slot = captured_registration_->slot(captured_slot_);
  record.state = HF_SAVE_CAPTURED;
  record.blocks_captured = capture_->blocks_done();
  record.device = capture_->device_copies();
  record.capture_ns = slot.captured_ns.load(std::memory_order_relaxed) -
                      slot.save_ns.load(std::memory_order_relaxed);
  capture_->Seal();
}

Error Job::WaitCaptured(int32_t group, Deadline deadline) {
  const HeldUp held(this);
  if (group != HF_ALL_GROUPS && (group < 0 || group >= static_cast<int32_t>(kGroupCount))) {
    return Error(HF_INVALID_ARGUMENT, "group: expected -1 to %u, found %d", kGroupCount - 1, group);
  }
  if (!capture_->running()) return Error();
  const int64_t called_ns = MonotonicNs();
  const uint64_t wanted = group == HF_ALL_GROUPS ? UINT64_MAX : uint64_t{1} << group;
  const uint64_t groups = wanted & unwaited_groups_;
  const bool last = (unwaited_groups_ & ~groups) == 0;
  Error error;
  const auto in_host_memory = [this](int32_t) -> SourceComparer& { return *reader_; };
  // A cancel that finds every block done was too late to matter.
  if (!capture_->WaitDone(groups, last, deadline) && capture_->Cancel()) {
    const Error failure = capture_->failure();
    const Error late(HF_DEADLINE_EXCEEDED,
                     "the capture of step %llu was cancelled after %llu of %llu blocks: its image "
                     "is void",
                     Print(current().step), Print(capture_->blocks_done()),
                     Print(current().blocks));
    error = CaptureFailed(failure.ok() ? late : failure);
  } else if (Error differs = checker_.Check(*captured_registration_, captured_slot_,
                                            Registration::Memory::kHost, groups, in_host_memory);
             !differs.ok()) {
    capture_->Cancel();
    error = CaptureFailed(differs);
  } else {
    unwaited_groups_ &= ~groups;
    if (last) CaptureSucceeded();
  }
  current().blocked_ns += MonotonicNs() - called_ns;
  // Slots may have been granted since the last time: the next capture shall find their pages.
  if (!capture_->running()) capture_->Populate(captured_registration_);
  return error;
}

std::optional<Error> Job::Outcome(uint64_t step, bool power) const {
  const abi::RankPage& page = link_->page();
  const uint64_t session_id = link_->session().id;
  const std::optional<AgentReport> report = FindReport(page, step);
  const SaveRecord* record = FindRecord(step);
  const std::atomic<uint64_t>& committed =
      power ? page.committed_power_step : page.committed_process_step;
  if (committed.load(std::memory_order_acquire) == step) return Error();
  if (report.has_value()) {
    if (report->state == HF_SAVE_FAILED) {
      if (!report->error.ok()) return report->error;
      return Error(HF_ABORTED, "the save of step %llu failed", Print(step));
    }
    if (report->state >= (power ? HF_SAVE_COMMITTED_POWER : HF_SAVE_COMMITTED_PROCESS)) {
      return Error();
    }
  } else if (record == nullptr) {
    return Error(HF_INVALID_ARGUMENT,
                 "step %llu is not among the last %zu that this process has saved", Print(step),
                 kSaveRecords);
  } else if (record->state == HF_SAVE_FAILED) {
    return record->error;
  } else if (record->session_id != session_id) {
    return Error(HF_ABORTED, "the agent that held the image of step %llu is gone", Print(step));
  }
  const uint32_t fenced_by = page.fenced_by.load(std::memory_order_acquire);
  if (fenced_by != 0) return Fenced(fenced_by);
  return std::nullopt;
}

Error Job::WaitCommitted(uint64_t step, uint32_t faults, Deadline deadline) {
  const HeldUp held(this);
  if ((faults & ~kKnownFaults) != 0) {
    return Error(HF_UNIMPLEMENTED, "faults: expected a subset of 0x%x (process, power), found 0x%x",
                 kKnownFaults, faults);
  }
  // Its commit needs the end of its capture, and nobody else will come to wait for that.
  if (capture_->running() && current().step == step) {
    if (Error error = WaitCaptured(HF_ALL_GROUPS, deadline); !error.ok()) return error;
  }
  for (;;) {
    abi::RankPage& page = link_->page();
    const uint32_t events = page.agent_events.load(std::memory_order_acquire);
    if (std::optional<Error> outcome = Outcome(step, (faults & HF_SURVIVE_POWER) != 0)) {
      return *outcome;
    }
    if (Error error = link_->WorthWaiting(); !error.ok()) return error;
    if (deadline.passed()) {
      return Error(HF_DEADLINE_EXCEEDED, "step %llu is not committed yet", Print(step));
    }
    FutexWait(page.agent_events, events, deadline.Earlier(Deadline::After(kLookNs)),
              FutexScope::kShared);
  }
}

// ---- Restore

Error Job::Restore(const hf_restore_options& options, hf_restore_result* result,
                   Deadline deadline) {
  const HeldUp held(this);
  const int64_t called_ns = MonotonicNs();
  if (capture_->running()) {
    return Error(HF_FAILED_PRECONDITION,
                 "the capture of step %llu has not been waited for (hf_wait_captured)",
                 Print(current().step));
  }
  Result<std::shared_ptr<const Selection>> selection = Selection::Make(options);
  if (!selection.ok()) return selection.error();
  restored_blobs_.reset();
  capture_->PausePopulate();
  Result<RestoreOutcome> outcome =
      RestoreBuffers(*link_, selection.value(), {options.streams, options.stream_count}, deadline);
  capture_->ResumePopulate();
  if (!outcome.ok()) return outcome.error();
  RestoreOutcome& restored = outcome.value();
  result->step = restored.step;
  result->attempt = restored.attempt;
  result->world_size = restored.world_size;
  result->bytes = restored.bytes;
  result->bytes_from_memory = restored.bytes_from_memory;
  result->nanoseconds = MonotonicNs() - called_ns;
  result->tensor_states = restored.tensor_states;
  result->tensor_states_left_out = restored.tensor_states_left_out;
  result->restore_from = restored.restore_from;
  restored_blobs_ = std::move(restored.blobs);
  return Error();
}

Result<std::span<const std::byte>> Job::RestoredBlob(std::string_view name, int64_t rank) const {
  if (!restored_blobs_.has_value()) {
    return Error(HF_FAILED_PRECONDITION, "blob '%s': nothing was restored (hf_restore)",
                 ShortName(name).text());
  }
  return restored_blobs_->Find(name, rank, settings_.rank, settings_.world_size);
}

// ---- Reports

const Job::SaveRecord* Job::FindRecord(uint64_t step) const {
  const uint64_t kept = std::min<uint64_t>(record_count_, kSaveRecords);
  for (uint64_t back = 1; back <= kept; ++back) {
    const SaveRecord& record = records_[(record_count_ - back) % kSaveRecords];
    if (record.step == step) return &record;
  }
  return nullptr;
}

void Job::GetInfo(hf_info* info) const {
  const abi::RankPage& page = link_->page();
  const Link::Session session = link_->session();
  info->attempt = session.attempt;
  info->fenced = page.fenced_by.load(std::memory_order_acquire) != 0 ? 1 : 0;
  info->connected = link_->connected() ? 1 : 0;
  info->reconnect_count = link_->reconnect_count();
  info->committed_process_step = page.committed_process_step.load(std::memory_order_acquire);
  info->committed_power_step = page.committed_power_step.load(std::memory_order_acquire);
  info->block_bytes = session.block_bytes;
  info->image_bytes = 0;
  if (Result<std::shared_ptr<Registration>> found = link_->registration(); found.ok()) {
    info->image_bytes = found.value()->image_bytes();
    info->block_bytes = found.value()->block_bytes();
  }
}

Error Job::Report(uint64_t step, hf_save_report* report) const {
  if (step == HF_LAST_STEP) {
    if (record_count_ == 0) return Error(HF_NOT_FOUND, "nothing was saved yet");
    step = records_[(record_count_ - 1) % kSaveRecords].step;
  }
  const SaveRecord* record = FindRecord(step);
  if (record == nullptr) {
    return Error(HF_NOT_FOUND, "step %llu is not among the last %zu that this process has saved",
                 Print(step), kSaveRecords);
  }
  const bool running =
      capture_->running() && record == &records_[(record_count_ - 1) % kSaveRecords];
  // The copiers know of it before anyone waits for them.
  const Error failure = running ? capture_->failure() : Error();
  const hf_save_state state = failure.ok() ? record->state : HF_SAVE_FAILED;
  Error error = failure.ok() ? record->error : failure;
  report->step = step;
  report->state = state;
  report->image_bytes = record->image_bytes;
  report->blocks = record->blocks;
  report->blocks_captured = running ? capture_->blocks_done() : record->blocks_captured;
  report->blocks_flushed = 0;
  report->call_ns = record->call_ns;
  report->blocked_ns = record->blocked_ns;
  report->capture_ns = record->capture_ns;
  report->flush_ns = 0;
  report->commit_ns = 0;
  const Capture::DeviceCopies device = running ? capture_->device_copies() : record->device;
  report->device_bytes = device.bytes;
  report->unpinned_bytes = device.unpinned_bytes;
  report->gate_ns = device.begun_ns == 0 ? 0 : device.begun_ns - record->begun_ns;
  report->device_ns = device.ended_ns == 0 ? 0 : device.ended_ns - device.begun_ns;
  if (std::optional<AgentReport> agent = FindReport(link_->page(), step)) {
    // The agent learns of the end of a capture behind us, and we of a commit behind it.
    if (state != HF_SAVE_FAILED) report->state = std::max(state, agent->state);
    report->blocks_flushed = agent->blocks_flushed;
    report->flush_ns = agent->flush_ns;
    report->commit_ns = agent->commit_ns;
    if (error.ok()) error = agent->error;
  } else if (state != HF_SAVE_FAILED &&
             link_->page().committed_power_step.load(std::memory_order_acquire) == step) {
    report->state = HF_SAVE_COMMITTED_POWER;  // by an agent that is gone
  } else if (state != HF_SAVE_FAILED && record->session_id != link_->session().id) {
    report->state = HF_SAVE_FAILED;
    error = Error(HF_ABORTED, "the agent that held the image of step %llu is gone", Print(step));
  }
  // An agent that has only found it on storage did not count.
  if (report->state == HF_SAVE_COMMITTED_POWER) {
    report->blocks_flushed = record->image_bytes / record->block_bytes;
  }
  report->error.code = error.code();
  std::memcpy(report->error.text, error.text(), std::strlen(error.text()) + 1);
  return Error();
}

}  // namespace holdfast::hook
