// For tests: one agent's half that follows captures, over a simulated disk and executor, with real
// shared memory and scripted trainers. The worker can be killed between any two steps of its loop
// and rebuilt from what the keeper holds.
#ifndef HOLDFAST_CHECKPOINT_CAPTURE_HARNESS_H_
#define HOLDFAST_CHECKPOINT_CAPTURE_HARNESS_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "checkpoint/session.h"
#include "tests/support/scripted_trainer.h"
#include "tests/support/sim_disk.h"
#include "tests/support/sim_executor.h"

namespace holdfast {

// Holds duplicates, as the keeper process does.
class FakeKeeper final : public DescriptorKeeper {
 public:
  void Keep(const std::string& name, int fd) override;
  void Drop(const std::string& name) override;
  std::vector<KeptDescriptor> HandOver() const;  // duplicates of all
  std::vector<std::string> Names() const;

 private:
  std::map<std::string, UniqueFd> fds_;
};

// What a Job does, without a group: starts a flush for every capture, and remembers all it is told.
class RecordingObserver final : public ImageObserver {
 public:
  // Where the image of a checkpoint goes; unset: no flush is started by itself.
  std::function<void(ImageId, const std::string& path)> start_flush;

  struct Image {
    CheckpointId checkpoint;
    Rank rank{};
    bool begun = false;
    std::optional<SealedImage> sealed;
    std::optional<std::string> durable_path;
    std::optional<absl::Status> void_status;
    std::optional<Afterwards> afterwards;
  };
  std::map<ImageId, Image> images;
  std::vector<std::string> log;  // "begun 5", "sealed 5", "durable 5", "void 5"

  const Image* Of(Rank rank, uint64_t step) const;  // the newest of that rank and step

  void OnCaptureBegun(ImageId id, Rank rank, CheckpointId checkpoint) override;
  void OnSealed(const SealedImage& image) override;
  void OnDurable(ImageId id, const std::string& path) override;
  void OnVoid(ImageId id, Rank rank, CheckpointId checkpoint, absl::Status why,
              Afterwards afterwards) override;
};

inline constexpr char kTestUuid[] = "01234567-89ab-4cde-8f01-23456789abcd";

struct HarnessOptions {
  uint64_t seed = 0;
  uint64_t budget_bytes = uint64_t{64} << 20;
  uint64_t block_bytes = 4096;
  uint32_t images_per_rank_max = 2;
  uint32_t writes_in_flight_max = 4;
  bool flush_by_itself = true;
  std::string layout;  // empty: TestLayout(1)
  abi::Copies copies = abi::Copies::kOnce;
  PopulateMemory populate = nullptr;
};

// Tensors of several dtypes and shapes, one spanning blocks, one scalar, one empty; replicated on
// `world_size` ranks (so that the writers share them).
std::string TestLayout(uint32_t world_size);
std::vector<TrainerBuffer> TestBuffers();
std::vector<TrainerBlob> TestBlobs();
// Of TestBlobs at a step; the second is not given at even steps.
std::vector<std::optional<std::string>> BlobsAt(uint64_t step);

// Where templates are built: in memory where there is such a place, because tests build hundreds.
std::string TestScratchDirectory();

class CaptureHarness {
 public:
  explicit CaptureHarness(const HarnessOptions& options);
  ~CaptureHarness();

  // A new process of a rank: opens a session, not registered.
  SessionId Open(Rank rank, uint32_t world_size = 1, Attempt attempt = Attempt{1});
  // hf_register with the test's layout, buffers and blobs. The status of the answer.
  absl::Status Register(SessionId session);
  // Whether the last one had a grant when it was told that it is registered.
  bool granted_when_answered() const { return granted_when_answered_; }
  // Everything a fresh session needs.
  SessionId OpenAndRegister(Rank rank, uint32_t world_size = 1, Attempt attempt = Attempt{1});

  Session& session(SessionId id) { return *sessions_.at(id); }
  ScriptedTrainer& trainer(SessionId id) { return *trainers_.at(id); }
  bool HasSession(SessionId id) const { return sessions_.count(id) > 0; }
  // Kills the process: its pidfd becomes readable. Nobody is told; see Session::ProcessDied.
  void KillProcess(SessionId id);

  // The doorbell of every session, then everything that can run.
  void Settle();
  void Ring();
  void RunSteps(uint64_t count_max = UINT64_MAX);
  // Steps of the loop so far; with `crash_at_step` the worker dies behind that one, and the harness
  // recovers at once.
  uint64_t steps() const { return steps_; }
  void CrashAtStep(uint64_t step, SimDisk::InFlight in_flight);
  bool crashed() const { return crash_count_ > 0; }
  // The worker dies now: sessions, executor and completions are gone; then a new one takes over.
  void Crash(SimDisk::InFlight in_flight);
  // What trainers do while there is no worker, at every crash.
  void set_while_dead(std::function<void()> while_dead) { while_dead_ = std::move(while_dead); }

  // The whole image that the trainer of `session` saved at `step`, by the definition.
  std::string OracleImage(SessionId session, uint64_t step);

  SimDisk& disk() { return disk_; }
  SimExecutor& executor() { return *executor_; }
  FakeKeeper& keeper() { return keeper_; }
  MemoryBudget& budget() { return *budget_; }
  RankMemories& memories() { return *memories_; }
  LayoutCache& layouts() { return *layouts_; }
  RecordingObserver& observer() { return observer_; }
  std::vector<std::string>& warnings() { return warnings_; }
  std::vector<std::string> ImageFiles() const;  // on the disk

 private:
  void MakeWorld();
  SessionWorld World();
  void RecoverAll();

  const HarnessOptions options_;
  SimDisk disk_;
  FakeKeeper keeper_;
  RecordingObserver observer_;
  std::string scratch_;
  // Of this worker.
  std::unique_ptr<SimExecutor> executor_;
  std::unique_ptr<MemoryBudget> budget_;
  std::unique_ptr<RankMemories> memories_;
  std::shared_ptr<LayoutCache> layouts_;
  std::map<SessionId, std::unique_ptr<Session>> sessions_;
  // Of the trainers, which outlive it.
  std::map<SessionId, std::unique_ptr<ScriptedTrainer>> trainers_;
  std::map<SessionId, UniqueFd> processes_;  // eventfds in the place of pidfds
  std::vector<std::string> warnings_;
  uint64_t next_session_ = 1;
  uint64_t steps_ = 0;
  bool granted_when_answered_ = false;
  std::optional<uint64_t> crash_at_step_;
  SimDisk::InFlight crash_in_flight_ = SimDisk::InFlight::kAll;
  uint64_t crash_count_ = 0;
  std::function<void()> while_dead_;
};

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_CAPTURE_HARNESS_H_
