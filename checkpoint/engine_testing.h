// For tests: a whole agent's engine, with its store, over a simulated disk and executor, real
// shared memory, and scripted trainers that save and restore. Workers and processes die when the
// test says so; the power is the disk's.
//
// The state of a job is defined here by element: the value of element i of tensor state t after
// step s is a function of (t, i, s), whatever the layout, so that what one layout saved can be
// compared in any other.
#ifndef HOLDFAST_CHECKPOINT_ENGINE_TESTING_H_
#define HOLDFAST_CHECKPOINT_ENGINE_TESTING_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "agent/file_store.h"
#include "checkpoint/catalog.h"
#include "checkpoint/engine.h"
#include "format/layout.h"
#include "tests/support/scripted_trainer.h"
#include "tests/support/sim_disk.h"
#include "tests/support/sim_executor.h"

namespace holdfast {

// Replicated parameters, ZeRO-1 optimizer state in a pack, a sharded tensor, over "dp".
std::string SmallLayout(uint32_t world_size);
std::vector<TrainerBlob> SmallBlobs();
std::string BlobText(const std::string& name, uint64_t step, uint32_t rank);

// Buffers of `rank` as they are after `step`.
std::vector<std::vector<std::byte>> StateAfter(const Layout& layout, Rank rank, uint64_t step);

class KeptInMemory final : public DescriptorKeeper {
 public:
  void Keep(const std::string& name, int fd) override;
  void Drop(const std::string& name) override;
  std::vector<KeptDescriptor> HandOver() const;
  size_t size() const { return fds_.size(); }

 private:
  std::map<std::string, UniqueFd> fds_;
};

// A training process.
struct TestTrainer {
  std::string job;
  Rank rank{};
  uint32_t world_size = 0;
  std::string attempt_key;
  std::string restore_from;
  uint32_t process_id = 0;
  std::unique_ptr<const Layout> layout;
  SessionId session{};
  Attempt attempt{};
  uint64_t registration_id = 0;
  UniqueFd process;  // an eventfd in the place of a pidfd
  UniqueFd page;
  std::unique_ptr<ScriptedTrainer> script;  // once registered
  bool dead = false;
  struct FlippedBit {
    uint32_t buffer = 0;
    uint64_t byte = 0;
    int bit = 0;
  };
  std::vector<FlippedBit> flipped;
};

struct RestoreOutcome {
  absl::Status status;  // of begun, or of ended
  CheckpointId checkpoint;
  uint32_t world_size = 0;
  uint64_t bytes = 0;
  uint64_t bytes_from_memory = 0;
  RestoreFrom restore_from = RestoreFrom::kNotGiven;
  uint64_t tensor_states = 0;
  uint64_t tensor_states_left_out = 0;
  uint64_t maps = 0;
  std::vector<std::vector<std::byte>> buffers;
  std::map<std::tuple<uint32_t, std::string, uint32_t>, std::string> blobs;  // scope, name, rank
};

struct EngineHarnessOptions {
  uint64_t seed = 0;
  uint64_t host_memory_bytes = uint64_t{64} << 20;
  uint32_t images_per_rank_max = 2;
  uint64_t block_bytes = 4096;
  abi::Copies copies = abi::Copies::kOnce;  // of all trainers that ask for nothing else
  uint64_t blobs_bytes_max = uint64_t{1} << 20;
  bool root_exists = false;
  // In the place of the disk itself, to which they lead.
  FileSystem* file_system = nullptr;
  IoRing* ring = nullptr;
  PopulateMemory populate = nullptr;
  std::string writer = "w";    // of the first worker; each next one appends its number
  std::string root = "/root";  // made if there is nothing at all
  uint32_t user_id = 0;        // of the agent; that of all trainers is 0
  // Of the first job that this agent makes; each next one counts up from it.
  uint64_t uuid_bits = 0x23456789abcd;
};

class EngineHarness {
 public:
  // The disk outlives it. Makes the root if nothing at all is there and root_exists is not set.
  EngineHarness(SimDisk& disk, const EngineHarnessOptions& options);
  ~EngineHarness();

  // A new process of a rank opens the job. What the engine answered.
  absl::StatusOr<TestTrainer*> Open(Rank rank, uint32_t world_size, const std::string& key = "",
                                    const std::string& job = "job",
                                    const std::string& restore_from = "");
  // The trainer's process opens as it did before, because it never heard the answer.
  absl::StatusOr<TestTrainer*> OpenAgain(TestTrainer& trainer);
  absl::Status Register(TestTrainer& trainer, const std::string& layout = "",
                        std::optional<abi::Copies> copies = std::nullopt);
  // Opens and registers ranks 0 to world_size - 1.
  absl::StatusOr<std::vector<TestTrainer*>> Launch(uint32_t world_size, const std::string& key = "",
                                                   const std::string& job = "job",
                                                   const std::string& restore_from = "");
  // The same for all ranks of a layout document.
  absl::StatusOr<std::vector<TestTrainer*>> LaunchIn(const std::string& layout,
                                                     const std::string& key = "");

  // From now on this trainer saves this bit of its buffer's byte the other way round.
  void FlipBit(TestTrainer& trainer, uint32_t buffer, uint64_t byte, int bit);

  // hf_save with the state after `step`: the slot; nothing if none was granted.
  std::optional<uint32_t> BeginSave(TestTrainer& trainer, uint64_t step);
  void FinishSave(TestTrainer& trainer, uint32_t slot);
  bool Save(TestTrainer& trainer, uint64_t step);                          // both
  void SaveAll(const std::vector<TestTrainer*>& trainers, uint64_t step);  // and Settle()s
  RestoreOutcome Restore(TestTrainer& trainer, RestoreSelection selection = {});
  void Kill(TestTrainer& trainer);
  void Close(TestTrainer& trainer);

  // Everything that can run without time passing, doorbells included.
  void Settle();
  // The worker dies, and a new one takes over; trainers reconnect.
  void CrashWorker(SimDisk::InFlight in_flight);
  // Reconnects one trainer, as the hook does; the engine's answer.
  absl::StatusOr<OpenResult> Reconnect(TestTrainer& trainer);
  // The whole agent dies: keeper and worker, and with them what is in memory.
  void CrashAgent();

  Engine& engine() { return *engine_; }
  SimExecutor& executor() { return *executor_; }
  FileStore& store() { return *store_; }
  KeptInMemory& keeper() { return *keeper_; }
  // What all workers have warned of.
  const std::vector<std::string>& warnings() const { return warnings_; }
  absl::StatusOr<Catalog> ReadJob(const std::string& job = "job");
  // rm -rf <root>/<job>, by somebody else.
  void RemoveJobDirectory(const std::string& job = "job");
  // What the trainer's page says: the newest step committed surviving power, and by process.
  static std::optional<uint64_t> CommittedPower(const TestTrainer& trainer);
  static std::optional<uint64_t> CommittedProcess(const TestTrainer& trainer);

 private:
  absl::StatusOr<std::vector<TestTrainer*>> LaunchRanks(uint32_t world_size,
                                                        const std::string& layout,
                                                        const std::string& key,
                                                        const std::string& job,
                                                        const std::string& restore_from);
  void StartWorker(bool recover);
  absl::StatusOr<TestTrainer*> OpenProcess(std::unique_ptr<TestTrainer> trainer);

  SimDisk& disk_;
  const EngineHarnessOptions options_;
  FileSystem& file_system_;
  IoRing& ring_;
  std::string scratch_;
  std::unique_ptr<KeptInMemory> keeper_;
  std::unique_ptr<SimExecutor> executor_;
  std::unique_ptr<FileStore> store_;
  std::unique_ptr<Engine> engine_;
  std::vector<std::unique_ptr<TestTrainer>> trainers_;
  std::vector<std::string> warnings_;
  uint64_t next_uuid_bits_;
  uint32_t worker_count_ = 0;
  uint32_t next_process_id_ = 100;
};

// Expects that the restored state is bit for bit that after `step`, blobs included.
void ExpectState(const RestoreOutcome& outcome, const TestTrainer& trainer, uint64_t step,
                 uint32_t old_world_size);
void KillAll(EngineHarness& harness, const std::vector<TestTrainer*>& trainers);

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_ENGINE_TESTING_H_
