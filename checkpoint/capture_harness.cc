#include "checkpoint/capture_harness.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"

namespace holdfast {

void FakeKeeper::Keep(const std::string& name, int fd) {
  CHECK(fds_.count(name) == 0);
  CHECK(!name.empty() && name.size() <= 64 &&
        name.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789./-") == std::string::npos);
  // Like the real one, it keeps the name where descriptors are short.
  fds_[name] = UniqueFd(fcntl(fd, F_DUPFD_CLOEXEC, 0));
}

void FakeKeeper::Drop(const std::string& name) { fds_.erase(name); }

std::vector<KeptDescriptor> FakeKeeper::HandOver() const {
  std::vector<KeptDescriptor> kept;
  for (const auto& [name, fd] : fds_) {
    kept.push_back({name, UniqueFd(fcntl(fd.get(), F_DUPFD_CLOEXEC, 0))});
  }
  return kept;
}

std::vector<std::string> FakeKeeper::Names() const {
  std::vector<std::string> names;
  for (const auto& [name, fd] : fds_) names.push_back(name);
  return names;
}

const RecordingObserver::Image* RecordingObserver::Of(Rank rank, uint64_t step) const {
  const Image* newest = nullptr;
  for (const auto& [id, image] : images) {
    if (image.rank == rank && Value(image.checkpoint.step) == step) newest = &image;
  }
  return newest;
}

void RecordingObserver::OnCaptureBegun(ImageId id, Rank rank, CheckpointId checkpoint) {
  // After a restart a slot's story is told again from the beginning.
  images[id] = Image();
  images[id].begun = true;
  images[id].rank = rank;
  images[id].checkpoint = checkpoint;
  log.push_back(absl::StrCat("begun ", Value(checkpoint.step)));
  if (start_flush) {
    start_flush(id, absl::StrFormat("/root/a%d.s%d.rank-%05d.h5", Value(checkpoint.attempt),
                                    Value(checkpoint.step), Value(rank)));
  }
}

void RecordingObserver::OnSealed(const SealedImage& image) {
  Image& known = images[image.id];
  EXPECT_TRUE(known.begun && !known.sealed && !known.durable_path);
  EXPECT_EQ(known.checkpoint, image.checkpoint);
  known.sealed = image;
  log.push_back(absl::StrCat("sealed ", Value(image.checkpoint.step)));
}

void RecordingObserver::OnDurable(ImageId id, const std::string& path) {
  Image& known = images[id];
  EXPECT_TRUE(known.sealed && !known.durable_path && !known.void_status);
  known.durable_path = path;
  log.push_back(absl::StrCat("durable ", Value(known.checkpoint.step)));
}

void RecordingObserver::OnVoid(ImageId id, Rank rank, CheckpointId checkpoint, absl::Status why,
                               Afterwards afterwards) {
  Image& known = images[id];
  EXPECT_TRUE(known.begun && !known.durable_path && !known.void_status);
  EXPECT_EQ(known.checkpoint, checkpoint);
  EXPECT_EQ(known.rank, rank);
  EXPECT_FALSE(why.ok());
  EXPECT_TRUE(afterwards == Afterwards::kGone || known.sealed);
  known.void_status = std::move(why);
  known.afterwards = afterwards;
  log.push_back(absl::StrCat("void ", Value(checkpoint.step)));
}

std::string TestLayout(uint32_t world_size) {
  return absl::StrFormat(
      R"({"holdfast_layout":1,"mesh":[{"axis":"dp","size":%d}],"tensors":[
      {"name":"wte","shape":[37,5],"states":[{"state":"param","dtype":"float32"},
                                             {"state":"exp_avg","dtype":"float32"}]},
      {"name":"a/b.c","shape":[7],"states":[{"state":"param","dtype":"bfloat16"}]},
      {"name":"big","shape":[3001],"states":[{"state":"param","dtype":"float32"}]},
      {"name":"step","shape":[],"states":[{"state":"param","dtype":"int64"}]},
      {"name":"none","shape":[0,3],"states":[{"state":"param","dtype":"float16"}]}]})",
      world_size);
}

std::vector<TrainerBuffer> TestBuffers() {
  return {{"param/big", 3001 * 4, 1},
          {"param/wte", 37 * 5 * 4, 0},
          {"exp_avg/wte", 37 * 5 * 4 + 100, 0},
          {"param/a/b.c", 14, 0},
          {"param/step", 8, 0}};
}

std::vector<TrainerBlob> TestBlobs() {
  return {{"rng", 1, 100}, {"args", 0, 5000}, {"empty", 1, 0}};
}

std::vector<std::optional<std::string>> BlobsAt(uint64_t step) {
  std::vector<std::optional<std::string>> blobs(3);
  blobs[0] = std::string(10 + step % 91, static_cast<char>('a' + step % 26));
  if (step % 2 == 1) blobs[1] = std::string(4321, static_cast<char>('A' + step % 26));
  blobs[2] = "";
  return blobs;
}

std::string TestScratchDirectory() {
  const std::string in_memory = "/dev/shm";
  return access(in_memory.c_str(), W_OK | X_OK) == 0 ? in_memory : testing::TempDir();
}

namespace {

SimDisk::Options DiskOptions(uint64_t seed) {
  SimDisk::Options options;
  options.seed = seed;
  return options;
}

}  // namespace

CaptureHarness::CaptureHarness(const HarnessOptions& options)
    : options_(options), disk_(DiskOptions(options.seed)), scratch_(TestScratchDirectory()) {
  CHECK_OK(disk_.CreateDirectory("/root"));
  if (options_.flush_by_itself) {
    observer_.start_flush = [this](ImageId id, const std::string& path) {
      RankImages* images = sessions_.at(id.session)->images_of(id);
      CHECK(images != nullptr);
      images->StartFlush(id, path);
    };
  }
  MakeWorld();
}

CaptureHarness::~CaptureHarness() {
  disk_.AbandonInFlight(SimDisk::InFlight::kNone);
  sessions_.clear();
  executor_.reset();
}

void CaptureHarness::MakeWorld() {
  executor_ = std::make_unique<SimExecutor>(options_.seed);
  executor_->Drive(disk_);
  budget_ = std::make_unique<MemoryBudget>(options_.budget_bytes);
  layouts_ = std::make_shared<LayoutCache>();
  memories_ = std::make_unique<RankMemories>(
      MemoryWorld{disk_, *executor_, *executor_, keeper_, *budget_, options_.populate});
}

SessionWorld CaptureHarness::World() {
  ImageWorld image{disk_, disk_, *executor_, *executor_, *executor_};
  image.flush_writes_in_flight_max = options_.writes_in_flight_max;
  SessionWorld world{image, keeper_, *memories_, layouts_, scratch_};
  world.block_bytes = options_.block_bytes;
  world.images_per_rank_max = options_.images_per_rank_max;
  return world;
}

SessionId CaptureHarness::Open(Rank rank, uint32_t world_size, Attempt attempt) {
  SessionIdentity identity;
  identity.session = SessionId{next_session_++};
  identity.job = "job";
  identity.job_uuid = kTestUuid;
  identity.attempt = attempt;
  identity.rank = rank;
  identity.world_size = world_size;
  identity.node = "node";
  const SessionId id = identity.session;
  UniqueFd process(eventfd(0, EFD_CLOEXEC));
  processes_[id] = UniqueFd(fcntl(process.get(), F_DUPFD_CLOEXEC, 0));
  auto session = Session::Create(identity, std::move(process), World());
  CHECK_OK(session.status());
  sessions_[id] = *std::move(session);
  sessions_[id]->Start(observer_);
  return id;
}

absl::Status CaptureHarness::Register(SessionId id) {
  Session& session = *sessions_.at(id);
  const std::string layout =
      options_.layout.empty() ? TestLayout(session.identity().world_size) : options_.layout;
  const std::string document = EncodeDocument(layout, TestBuffers(), TestBlobs(), options_.copies);
  std::optional<absl::Status> prepared;
  session.Prepare(SealedDocument(document), document.size(),
                  [&](const absl::StatusOr<std::shared_ptr<const Registration>>& result) {
                    prepared = result.status();
                  });
  executor_->RunUntilIdle();
  CHECK(prepared.has_value());
  if (!prepared->ok()) return *prepared;
  std::optional<absl::Status> answer;
  session.Register([&](absl::StatusOr<RegisterResult> result) {
    answer = result.status();
    if (!result.ok()) return;
    trainers_[id] = std::make_unique<ScriptedTrainer>(
        ScriptedTrainer::Descriptors{session.reports().fd(), result->memory_fd,
                                     result->registration_memory_fd, result->capture_plan_fd},
        TestBuffers());
    granted_when_answered_ = trainers_[id]->HasGrant();
  });
  CHECK(!answer.has_value());  // never inside the call
  executor_->RunUntilIdle();
  CHECK(answer.has_value());
  return *answer;
}

SessionId CaptureHarness::OpenAndRegister(Rank rank, uint32_t world_size, Attempt attempt) {
  const SessionId id = Open(rank, world_size, attempt);
  CHECK_OK(Register(id));
  return id;
}

void CaptureHarness::KillProcess(SessionId id) {
  CHECK(eventfd_write(processes_.at(id).get(), 1) == 0);
}

void CaptureHarness::Ring() {
  for (const auto& [id, session] : sessions_) session->Advance();
}

void CaptureHarness::Settle() {
  Ring();
  RunSteps();
}

void CaptureHarness::RunSteps(uint64_t count_max) {
  for (uint64_t i = 0; i < count_max && executor_->RunOne(); ++i) {
    ++steps_;
    if (crash_at_step_ == steps_) {
      crash_at_step_.reset();
      Crash(crash_in_flight_);
      return;
    }
  }
}

void CaptureHarness::CrashAtStep(uint64_t step, SimDisk::InFlight in_flight) {
  crash_at_step_ = step;
  crash_in_flight_ = in_flight;
}

void CaptureHarness::Crash(SimDisk::InFlight in_flight) {
  ++crash_count_;
  disk_.AbandonInFlight(in_flight);
  sessions_.clear();
  // Work and functions that have not run die with their worker.
  executor_.reset();
  memories_.reset();
  budget_.reset();
  if (while_dead_) while_dead_();
  MakeWorld();
  RecoverAll();
}

void CaptureHarness::RecoverAll() {
  bool done = false;
  Session::Recover(keeper_.HandOver(), World(), [&](Session::Recovered recovered) {
    done = true;
    EXPECT_TRUE(recovered.others.empty());
    for (const std::string& warning : recovered.warnings) warnings_.push_back(warning);
    for (std::unique_ptr<Session>& session : recovered.sessions) {
      const SessionId id = session->identity().session;
      sessions_[id] = std::move(session);
    }
    for (const auto& [id, session] : sessions_) session->Start(observer_);
  });
  CHECK(!done);
  executor_->RunUntilIdle();
  CHECK(done);
}

std::string CaptureHarness::OracleImage(SessionId id, uint64_t step) {
  const Session& session = *sessions_.at(id);
  const Registration& registration = *session.registration(session.current_registration_id());
  std::string image(registration.image_bytes(), '\0');
  const std::vector<std::optional<std::string>> blobs = BlobsAt(step);
  std::vector<uint64_t> lengths;
  for (const std::optional<std::string>& blob : blobs) {
    lengths.push_back(blob ? blob->size() : kBlobAbsent);
  }
  const std::vector<uint64_t> stored = registration.StoredBlobBytes(lengths);
  const ImageStamp stamp = {{session.identity().attempt, Step{step}}, stored};
  registration.image().StampHead(
      stamp, 0,
      std::as_writable_bytes(std::span<char>(image)).first(registration.image().head_bytes()));
  for (const auto& [offset, bytes] : trainers_.at(id)->TrainerBytes(step, blobs)) {
    if (offset >= image.size()) continue;  // an extra copy
    image.replace(offset, bytes.size(), bytes);
  }
  return image;
}

std::vector<std::string> CaptureHarness::ImageFiles() const { return disk_.AllFiles(); }

}  // namespace holdfast
