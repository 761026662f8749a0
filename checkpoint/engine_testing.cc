#include "checkpoint/engine_testing.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "hook/abi/shared_memory.h"

namespace holdfast {
namespace {

UniqueFd Duplicate(int fd) {
  UniqueFd copy(fcntl(fd, F_DUPFD_CLOEXEC, 0));
  CHECK(copy);
  return copy;
}

// The bytes of element `element` of a tensor state after `step`.
void WriteElement(uint64_t step, uint64_t tensor_state, uint64_t element,
                  std::span<std::byte> out) {
  uint64_t z = step * 0x9E3779B97F4A7C15u + tensor_state * 0xBF58476D1CE4E5B9u + element;
  for (std::byte& byte : out) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    byte = static_cast<std::byte>(z >> 56);
  }
}

// Calls `visit(element of the tensor, offset in the buffer)` for each element of a segment.
template <typename Visit>
void ForEachElement(const RankLayout& rank, const TensorState& state, const Segment& segment,
                    Visit visit) {
  const uint64_t element_bytes = ElementBytes(state.dtype);
  std::vector<uint64_t> lo(state.shape.size(), 0);
  std::vector<uint64_t> size = state.shape;
  if (segment.piece.box != kWholeTensor) {
    const BoxView box = rank.boxes[segment.piece.box];
    lo.assign(box.lo.begin(), box.lo.end());
    size.assign(box.size.begin(), box.size.end());
  }
  for (uint64_t i = segment.piece.begin; i < segment.piece.end; ++i) {
    uint64_t rest = i;
    uint64_t element = 0;
    uint64_t scale = 1;
    uint64_t offset = segment.buffer_offset_bytes;
    for (size_t d = state.shape.size(); d-- > 0;) {
      const uint64_t x = rest % size[d];
      rest /= size[d];
      element += (lo[d] + x) * scale;
      scale *= state.shape[d];
      if (segment.strides != kContiguous) offset += x * rank.strides_bytes[segment.strides][d];
    }
    if (segment.strides == kContiguous) offset += (i - segment.piece.begin) * element_bytes;
    visit(element, offset);
  }
}

std::span<const std::byte> MapReadOnly(int fd, uint64_t bytes) {
  if (bytes == 0) return {};
  void* memory = mmap(nullptr, bytes, PROT_READ, MAP_SHARED, fd, 0);
  CHECK(memory != MAP_FAILED);
  return {static_cast<const std::byte*>(memory), bytes};
}

void Unmap(std::span<const std::byte> memory) {
  if (!memory.empty()) munmap(const_cast<std::byte*>(memory.data()), memory.size());
}

std::optional<uint64_t> StepOf(const std::atomic<uint64_t>& word) {
  const uint64_t step = word.load();
  return step == abi::kNoStep ? std::nullopt : std::optional(step);
}

// The trainer's side of a restore, by the contract in hook/abi.
class RestoreConsumer {
 public:
  RestoreConsumer(ScriptedTrainer& script, RestoreOutcome& outcome, RestoreBegun begun)
      : script_(script), outcome_(outcome), begun_(std::move(begun)) {
    operations_ = MapReadOnly(begun_.operations_fd.get(), begun_.operations_bytes);
    for (const RestoreBegun::Map& map : begun_.maps) {
      // A descriptor of another rank's memory gives no way to write.
      EXPECT_EQ(mmap(nullptr, map.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, map.fd.get(), 0),
                MAP_FAILED);
      maps_.push_back(MapReadOnly(map.fd.get(), map.bytes));
    }
    for (const std::vector<std::byte>& buffer : script_.buffers()) {
      outcome_.buffers.emplace_back(buffer.size(), std::byte{0xEE});
    }
    outcome_.maps = maps_.size();
    ReadBlobs();
  }
  ~RestoreConsumer() {
    Unmap(operations_);
    for (const std::span<const std::byte> map : maps_) Unmap(map);
  }

  // Copies what the ring holds. False: nothing was there.
  bool Consume() {
    abi::RestoreRing& ring = script_.registration().restore;
    const uint32_t produced = ring.produced.load();
    uint32_t consumed = ring.consumed.load();
    if (consumed == produced) return false;
    for (; consumed != produced; ++consumed) {
      Copy(ring.entries[consumed % abi::kRestoreEntries]);
      ring.consumed.store(consumed + 1);
    }
    return true;
  }

 private:
  void Copy(const abi::RestoreEntry& entry) {
    const std::span<const std::byte> memory =
        entry.map_id == 0 ? script_.memory_bytes() : maps_.at(entry.map_id - 1);
    const std::span<const std::byte> piece = memory.subspan(entry.offset, entry.bytes);
    ASSERT_LE(entry.first_op + entry.op_count, begun_.op_count);
    for (uint64_t i = entry.first_op; i < entry.first_op + entry.op_count; ++i) {
      abi::RestoreOp op;
      std::memcpy(&op, operations_.data() + i * sizeof(op), sizeof(op));
      std::vector<std::byte>& buffer = outcome_.buffers.at(op.buffer_index);
      for (uint64_t run = 0; run < op.count; ++run) {
        const uint64_t from = op.source_offset + run * op.source_stride;
        const uint64_t to = op.buffer_offset + run * op.buffer_stride;
        ASSERT_LE(from + op.run_bytes, piece.size());
        ASSERT_LE(to + op.run_bytes, buffer.size());
        std::memcpy(buffer.data() + to, piece.data() + from, op.run_bytes);
      }
    }
  }

  void ReadBlobs() {
    const std::span<const std::byte> bytes = MapReadOnly(begun_.blobs_fd.get(), begun_.blobs_bytes);
    abi::RestoredBlobs header;
    std::memcpy(&header, bytes.data(), sizeof(header));
    for (uint64_t i = 0; i < header.blob_count; ++i) {
      abi::RestoredBlob blob;
      std::memcpy(&blob, bytes.data() + sizeof(header) + i * sizeof(blob), sizeof(blob));
      const auto text = [&](uint64_t offset, uint64_t count) {
        return std::string(reinterpret_cast<const char*>(bytes.subspan(offset, count).data()),
                           count);
      };
      outcome_.blobs[{blob.scope, text(blob.name_offset, blob.name_bytes), blob.rank}] =
          text(blob.data_offset, blob.data_bytes);
    }
    Unmap(bytes);
  }

  ScriptedTrainer& script_;
  RestoreOutcome& outcome_;
  const RestoreBegun begun_;
  std::span<const std::byte> operations_;
  std::vector<std::span<const std::byte>> maps_;
};

}  // namespace

std::string SmallLayout(uint32_t world_size) {
  return absl::StrFormat(
      R"({"holdfast_layout":1,"mesh":[{"axis":"dp","size":%d}],
      "packs":[{"pack":"m","axis":"dp","buffer":"exp_avg"}],
      "tensors":[
      {"name":"wte","shape":[37,25],"states":[
        {"state":"param","dtype":"float32"},
        {"state":"exp_avg","dtype":"float32","place":[{"op":"pack","pack":"m"}]}]},
      {"name":"a/b.c","shape":[11,3],"states":[
        {"state":"param","dtype":"bfloat16"},
        {"state":"exp_avg","dtype":"float32","place":[{"op":"pack","pack":"m"}]}]},
      {"name":"cut","shape":[10,40],"states":[
        {"state":"param","dtype":"float32",
         "place":[{"op":"shard","dim":0,"axis":"dp","rule":"balanced"}]}]},
      {"name":"steps","shape":[],"states":[{"state":"param","dtype":"int64"}]}]})",
      world_size);
}

std::vector<TrainerBlob> SmallBlobs() { return {{"rng", 1, 40}, {"args", 0, 60}}; }

std::string BlobText(const std::string& name, uint64_t step, uint32_t rank) {
  return name == "args" ? absl::StrCat("args after ", step)
                        : absl::StrCat("rng of ", rank, " after ", step);
}

std::vector<std::vector<std::byte>> StateAfter(const Layout& layout, Rank rank, uint64_t step) {
  const RankLayout held = layout.ForRank(rank).value();
  std::vector<std::vector<std::byte>> buffers;
  // What no segment covers (padding of packs) is never saved and never restored.
  for (const BufferNeed& need : held.buffers) buffers.emplace_back(need.bytes, std::byte{0xEE});
  for (const Segment& segment : held.segments) {
    const TensorState& state = layout.tensor_states()[segment.piece.tensor_state];
    ForEachElement(held, state, segment, [&](uint64_t element, uint64_t offset) {
      WriteElement(step, segment.piece.tensor_state, element,
                   std::span(buffers[segment.buffer]).subspan(offset, ElementBytes(state.dtype)));
    });
  }
  return buffers;
}

// ---- Keeper ----

void KeptInMemory::Keep(const std::string& name, int fd) {
  CHECK(!fds_.contains(name));
  fds_[name] = Duplicate(fd);
}

void KeptInMemory::Drop(const std::string& name) { fds_.erase(name); }

std::vector<KeptDescriptor> KeptInMemory::HandOver() const {
  std::vector<KeptDescriptor> kept;
  for (const auto& [name, fd] : fds_) kept.push_back({name, Duplicate(fd.get())});
  return kept;
}

// ---- Worker ----

EngineHarness::EngineHarness(SimDisk& disk, const EngineHarnessOptions& options)
    : disk_(disk),
      options_(options),
      file_system_(options.file_system == nullptr ? static_cast<FileSystem&>(disk)
                                                  : *options.file_system),
      ring_(options.ring == nullptr ? static_cast<IoRing&>(disk) : *options.ring),
      scratch_(testing::TempDir()),
      keeper_(std::make_unique<KeptInMemory>()),
      next_uuid_bits_(options.uuid_bits) {
  if (!options_.root_exists && disk_.AllFiles().empty()) {
    CHECK_OK(disk_.CreateDirectory(options_.root));
    CHECK_OK(disk_.SyncDirectory("/"));
  }
  StartWorker(/*recover=*/false);
}

EngineHarness::~EngineHarness() {
  engine_.reset();
  executor_.reset();
}

void EngineHarness::StartWorker(bool recover) {
  ++worker_count_;
  executor_ = std::make_unique<SimExecutor>(options_.seed);
  executor_->Drive(ring_);
  FileStore::Options store_options;
  store_options.root = options_.root;
  store_options.writer = absl::StrCat(options_.writer, worker_count_);
  store_options.make_uuid = [this] {
    return absl::StrFormat("01234567-89ab-4cde-8f01-%012x", next_uuid_bits_++);
  };
  store_ = std::make_unique<FileStore>(file_system_, *executor_, store_options);
  EngineOptions engine_options;
  engine_options.root = options_.root;
  engine_options.user_id = options_.user_id;
  engine_options.scratch_directory = scratch_;
  engine_options.host_memory_bytes_max = options_.host_memory_bytes;
  engine_options.block_bytes = options_.block_bytes;
  engine_options.blobs_bytes_max = options_.blobs_bytes_max;
  engine_options.images_per_rank_max = options_.images_per_rank_max;
  engine_options.flush_writes_in_flight_max = 4;
  engine_options.writer = store_options.writer;
  engine_options.on_warning = [this](const std::string& text) { warnings_.push_back(text); };
  absl::StatusOr<std::unique_ptr<Engine>> engine =
      Engine::Create(engine_options, EngineWorld{file_system_, ring_, *executor_, *executor_,
                                                 *executor_, *store_, *keeper_, options_.populate});
  CHECK_OK(engine.status());
  engine_ = *std::move(engine);
  if (!recover) return;
  bool recovered = false;
  engine_->Recover(keeper_->HandOver(), [&recovered] { recovered = true; });
  executor_->RunUntilIdle();
  CHECK(recovered);
}

void EngineHarness::CrashWorker(SimDisk::InFlight in_flight) {
  engine_.reset();
  disk_.AbandonInFlight(in_flight);
  executor_.reset();
  StartWorker(/*recover=*/true);
  for (const std::unique_ptr<TestTrainer>& trainer : trainers_) {
    // A fenced one is refused, as it should be; the test asks again if it cares.
    if (!trainer->dead) Reconnect(*trainer).IgnoreError();
  }
  Settle();
}

absl::StatusOr<OpenResult> EngineHarness::Reconnect(TestTrainer& trainer) {
  OpenParameters parameters;
  parameters.job = trainer.job;
  parameters.rank = trainer.rank;
  parameters.world_size = trainer.world_size;
  parameters.process_id = trainer.process_id;
  parameters.process_fd = Duplicate(trainer.process.get());
  parameters.doorbell_fd = UniqueFd(eventfd(0, EFD_CLOEXEC));
  parameters.restore_from = trainer.restore_from;
  parameters.resume_attempt = trainer.attempt;
  parameters.resume_session = trainer.session;
  parameters.resume_registration_id = trainer.registration_id;
  absl::StatusOr<OpenResult> result = absl::UnknownError("no answer");
  engine_->Open(std::move(parameters),
                [&result](absl::StatusOr<OpenResult> answer) { result = std::move(answer); });
  executor_->RunUntilIdle();
  if (result.ok() && !result->resumed) {
    trainer.session = result->session;
    trainer.page = Duplicate(result->rank_page_fd);
    trainer.registration_id = 0;
    trainer.script.reset();
  }
  return result;
}

void EngineHarness::CrashAgent() {
  engine_.reset();
  disk_.AbandonInFlight(SimDisk::InFlight::kAll);
  executor_.reset();
  keeper_ = std::make_unique<KeptInMemory>();
  StartWorker(/*recover=*/false);
}

void EngineHarness::Settle() {
  for (int round = 0; round < 3; ++round) {
    for (const SessionId session : engine_->sessions()) engine_->Doorbell(session);
    executor_->RunUntilIdle();
  }
}

// ---- Trainers ----

absl::StatusOr<TestTrainer*> EngineHarness::Open(Rank rank, uint32_t world_size,
                                                 const std::string& key, const std::string& job,
                                                 const std::string& restore_from) {
  auto trainer = std::make_unique<TestTrainer>();
  trainer->job = job;
  trainer->rank = rank;
  trainer->world_size = world_size;
  trainer->attempt_key = key;
  trainer->restore_from = restore_from;
  trainer->process_id = next_process_id_++;
  trainer->process = UniqueFd(eventfd(0, EFD_CLOEXEC));
  return OpenProcess(std::move(trainer));
}

absl::StatusOr<TestTrainer*> EngineHarness::OpenAgain(TestTrainer& trainer) {
  auto again = std::make_unique<TestTrainer>();
  again->job = trainer.job;
  again->rank = trainer.rank;
  again->world_size = trainer.world_size;
  again->attempt_key = trainer.attempt_key;
  again->restore_from = trainer.restore_from;
  again->process_id = trainer.process_id;
  again->process = Duplicate(trainer.process.get());
  return OpenProcess(std::move(again));
}

absl::StatusOr<TestTrainer*> EngineHarness::OpenProcess(std::unique_ptr<TestTrainer> trainer) {
  OpenParameters parameters;
  parameters.job = trainer->job;
  parameters.attempt_key = trainer->attempt_key;
  parameters.restore_from = trainer->restore_from;
  parameters.node = "node";
  parameters.rank = trainer->rank;
  parameters.world_size = trainer->world_size;
  parameters.process_id = trainer->process_id;
  parameters.process_fd = Duplicate(trainer->process.get());
  parameters.doorbell_fd = UniqueFd(eventfd(0, EFD_CLOEXEC));
  absl::StatusOr<OpenResult> result = absl::UnknownError("no answer");
  engine_->Open(std::move(parameters),
                [&result](absl::StatusOr<OpenResult> answer) { result = std::move(answer); });
  executor_->RunUntilIdle();
  RETURN_IF_ERROR(result.status());
  trainer->session = result->session;
  trainer->attempt = result->attempt;
  trainer->page = Duplicate(result->rank_page_fd);
  trainers_.push_back(std::move(trainer));
  return trainers_.back().get();
}

absl::Status EngineHarness::Register(TestTrainer& trainer, const std::string& layout,
                                     std::optional<abi::Copies> copies) {
  const std::string document = layout.empty() ? SmallLayout(trainer.world_size) : layout;
  ASSIGN_OR_RETURN(trainer.layout, Layout::Parse(document));
  std::vector<TrainerBuffer> buffers;
  ASSIGN_OR_RETURN(const RankLayout held, trainer.layout->ForRank(trainer.rank));
  for (const BufferNeed& need : held.buffers) {
    buffers.push_back({need.name, need.bytes, 0});
  }
  const std::string encoded =
      EncodeDocument(document, buffers, SmallBlobs(), copies.value_or(options_.copies));
  absl::StatusOr<RegisterResult> result = absl::UnknownError("no answer");
  engine_->Register(trainer.session, SealedDocument(encoded), encoded.size(),
                    [&result](absl::StatusOr<RegisterResult> answer) { result = answer; });
  executor_->RunUntilIdle();
  for (int i = 0; i < 10 && result.status().code() == absl::StatusCode::kUnknown; ++i) {
    executor_->AdvanceTime(absl::Milliseconds(100));
  }
  RETURN_IF_ERROR(result.status());
  trainer.registration_id = result->registration_id;
  trainer.script = std::make_unique<ScriptedTrainer>(
      ScriptedTrainer::Descriptors{.rank_page = trainer.page.get(),
                                   .memory = result->memory_fd,
                                   .registration_memory = result->registration_memory_fd,
                                   .capture_plan = result->capture_plan_fd},
      buffers);
  return absl::OkStatus();
}

absl::StatusOr<std::vector<TestTrainer*>> EngineHarness::Launch(uint32_t world_size,
                                                                const std::string& key,
                                                                const std::string& job,
                                                                const std::string& restore_from) {
  return LaunchRanks(world_size, "", key, job, restore_from);
}

absl::StatusOr<std::vector<TestTrainer*>> EngineHarness::LaunchIn(const std::string& layout,
                                                                  const std::string& key) {
  return LaunchRanks(Layout::Parse(layout).value()->world_size(), layout, key, "job", "");
}

absl::StatusOr<std::vector<TestTrainer*>> EngineHarness::LaunchRanks(
    uint32_t world_size, const std::string& layout, const std::string& key, const std::string& job,
    const std::string& restore_from) {
  std::vector<TestTrainer*> trainers;
  for (uint32_t rank = 0; rank < world_size; ++rank) {
    ASSIGN_OR_RETURN(TestTrainer* const trainer,
                     Open(Rank{rank}, world_size, key, job, restore_from));
    trainers.push_back(trainer);
  }
  for (TestTrainer* trainer : trainers) RETURN_IF_ERROR(Register(*trainer, layout));
  return trainers;
}

void EngineHarness::FlipBit(TestTrainer& trainer, uint32_t buffer, uint64_t byte, int bit) {
  trainer.flipped.push_back({buffer, byte, bit});
}

std::optional<uint32_t> EngineHarness::BeginSave(TestTrainer& trainer, uint64_t step) {
  std::vector<std::optional<std::string>> blobs;
  for (const TrainerBlob& blob : SmallBlobs()) {
    blobs.push_back(BlobText(blob.name, step, Value(trainer.rank)));
  }
  const std::optional<uint32_t> slot = trainer.script->BeginSave(step, blobs);
  trainer.script->buffers() = StateAfter(*trainer.layout, trainer.rank, step);
  for (const TestTrainer::FlippedBit& flipped : trainer.flipped) {
    trainer.script->buffers()[flipped.buffer][flipped.byte] ^= std::byte{1} << flipped.bit;
  }
  engine_->Doorbell(trainer.session);
  return slot;
}

void EngineHarness::FinishSave(TestTrainer& trainer, uint32_t slot) {
  trainer.script->CopyBlocks(slot);
  trainer.script->Finish(slot);
  engine_->Doorbell(trainer.session);
}

bool EngineHarness::Save(TestTrainer& trainer, uint64_t step) {
  const std::optional<uint32_t> slot = BeginSave(trainer, step);
  if (slot.has_value()) FinishSave(trainer, *slot);
  return slot.has_value();
}

void EngineHarness::SaveAll(const std::vector<TestTrainer*>& trainers, uint64_t step) {
  for (TestTrainer* trainer : trainers) EXPECT_TRUE(Save(*trainer, step)) << step;
  Settle();
}

RestoreOutcome EngineHarness::Restore(TestTrainer& trainer, RestoreSelection selection) {
  RestoreOutcome outcome;
  outcome.status = absl::UnknownError("no answer");
  std::unique_ptr<RestoreConsumer> consumer;
  bool over = false;
  engine_->Restore(
      trainer.session, trainer.registration_id, std::move(selection),
      [&](absl::StatusOr<RestoreBegun> begun) {
        if (!begun.ok()) {
          outcome.status = begun.status();
          over = true;
          return;
        }
        outcome.checkpoint = begun->checkpoint;
        outcome.world_size = begun->world_size;
        outcome.restore_from = begun->restore_from;
        outcome.tensor_states = begun->tensor_states;
        outcome.tensor_states_left_out = begun->tensor_states_left_out;
        consumer = std::make_unique<RestoreConsumer>(*trainer.script, outcome, *std::move(begun));
      },
      [&](absl::StatusOr<RestoreEnded> ended) {
        outcome.status = ended.status();
        if (ended.ok()) {
          outcome.bytes = ended->bytes;
          outcome.bytes_from_memory = ended->bytes_from_memory;
        }
        over = true;
      });
  executor_->RunUntilIdle();
  while (!over && consumer != nullptr && consumer->Consume()) {
    engine_->Doorbell(trainer.session);
    executor_->RunUntilIdle();
  }
  EXPECT_TRUE(over) << "the restore got stuck";
  return outcome;
}

void EngineHarness::Kill(TestTrainer& trainer) {
  trainer.dead = true;
  trainer.script.reset();
  engine_->ProcessDied(trainer.session);
  executor_->RunUntilIdle();
}

void EngineHarness::Close(TestTrainer& trainer) {
  engine_->Close(trainer.session);
  executor_->RunUntilIdle();
}

absl::StatusOr<Catalog> EngineHarness::ReadJob(const std::string& job) {
  return ReadCatalog(disk_, options_.root, job);
}

void EngineHarness::RemoveJobDirectory(const std::string& job) {
  const std::string directory = absl::StrCat(options_.root, "/", job);
  for (const std::string& path : disk_.AllFiles()) {
    if (path.rfind(directory + "/", 0) == 0) disk_.RemoveFile(path);
  }
  disk_.RemoveFile(directory);
}

std::optional<uint64_t> EngineHarness::CommittedPower(const TestTrainer& trainer) {
  return StepOf(trainer.script->page().committed_power_step);
}

std::optional<uint64_t> EngineHarness::CommittedProcess(const TestTrainer& trainer) {
  return StepOf(trainer.script->page().committed_process_step);
}

void ExpectState(const RestoreOutcome& outcome, const TestTrainer& trainer, uint64_t step,
                 uint32_t old_world_size) {
  ASSERT_TRUE(outcome.status.ok()) << outcome.status;
  EXPECT_EQ(Value(outcome.checkpoint.step), step);
  EXPECT_EQ(outcome.world_size, old_world_size);
  EXPECT_TRUE(outcome.buffers == StateAfter(*trainer.layout, trainer.rank, step));
  ASSERT_EQ(outcome.blobs.size(), old_world_size + 1);
  EXPECT_EQ(outcome.blobs.at({0, "args", 0}), BlobText("args", step, 0));
  for (uint32_t rank = 0; rank < old_world_size; ++rank) {
    EXPECT_EQ(outcome.blobs.at({1, "rng", rank}), BlobText("rng", step, rank));
  }
}

void KillAll(EngineHarness& harness, const std::vector<TestTrainer*>& trainers) {
  for (TestTrainer* trainer : trainers) harness.Kill(*trainer);
}

}  // namespace holdfast
