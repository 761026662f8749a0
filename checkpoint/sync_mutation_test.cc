// Is the crash enumeration able to fail? Every single sync of a job of 2 ranks that saves twice is
// left out in turn (it says OK and does nothing), the power is cut after every operation, and some
// choice of survivors must break a promise. Nothing on the way of a commit may be missed by nobody.
// The job's own directories are synced again at each open; there all syncs of one directory are
// left out together.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "checkpoint/engine_testing.h"
#include "checkpoint/readback_testing.h"
#include "tests/support/sim_disk.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

constexpr uint32_t kRanks = 2;

// A disk some of whose syncs do nothing.
class SyncDropper final : public FileSystem, public IoRing {
 public:
  // `drops` is asked at each sync, with what it is and how many came before it.
  using Drops = std::function<bool(const std::string& what, uint64_t index)>;
  SyncDropper(SimDisk& disk, Drops drops) : disk_(disk), drops_(std::move(drops)) {}

  const std::vector<std::string>& syncs() const { return syncs_; }

  absl::StatusOr<std::unique_ptr<WritableFile>> CreateNew(const std::string& path) override {
    absl::StatusOr<std::unique_ptr<WritableFile>> file = disk_.CreateNew(path);
    if (!file.ok()) return file;
    return std::unique_ptr<WritableFile>(new Writable(*this, *std::move(file), path));
  }
  absl::StatusOr<std::unique_ptr<IoFile>> CreateSized(const std::string& path, uint64_t size_bytes,
                                                      Caching caching) override {
    last_image_ = path;
    return disk_.CreateSized(path, size_bytes, caching);
  }
  absl::StatusOr<std::unique_ptr<IoFile>> OpenForRead(const std::string& path,
                                                      Caching caching) override {
    return disk_.OpenForRead(path, caching);
  }
  absl::StatusOr<std::string> ReadSmallFile(const std::string& path, uint64_t bytes_max) override {
    return disk_.ReadSmallFile(path, bytes_max);
  }
  absl::Status Link(const std::string& from, const std::string& to) override {
    return disk_.Link(from, to);
  }
  absl::Status SyncFile(const std::string& path) override {
    return IsDropped("file " + path) ? absl::OkStatus() : disk_.SyncFile(path);
  }
  absl::Status Unlink(const std::string& path) override { return disk_.Unlink(path); }
  absl::Status CreateDirectory(const std::string& path) override {
    return disk_.CreateDirectory(path);
  }
  absl::Status SyncDirectory(const std::string& path) override {
    return IsDropped("directory " + path) ? absl::OkStatus() : disk_.SyncDirectory(path);
  }
  absl::StatusOr<std::vector<std::string>> List(const std::string& path,
                                                size_t count_max) override {
    return disk_.List(path, count_max);
  }
  absl::StatusOr<FileInfo> Stat(const std::string& path) override { return disk_.Stat(path); }
  absl::StatusOr<Space> SpaceOf(const std::string& path) override { return disk_.SpaceOf(path); }

  void Write(IoFile& file, uint64_t offset_bytes, std::span<const std::byte> data,
             Done done) override {
    disk_.Write(file, offset_bytes, data, std::move(done));
  }
  void Read(IoFile& file, uint64_t offset_bytes, std::span<std::byte> data, Done done) override {
    disk_.Read(file, offset_bytes, data, std::move(done));
  }
  void Sync(IoFile& file, Done done) override {
    if (IsDropped("an image, the last created was " + last_image_)) {
      disk_.Write(file, 0, {}, std::move(done));  // completes, and does nothing
    } else {
      disk_.Sync(file, std::move(done));
    }
  }
  bool RegisterMemory(std::span<std::byte> memory) override { return disk_.RegisterMemory(memory); }
  void UnregisterMemory(std::span<std::byte> memory) override { disk_.UnregisterMemory(memory); }
  int event_fd() const override { return -1; }
  void RunCompletions() override { disk_.RunCompletions(); }
  size_t in_flight_count() const override { return disk_.in_flight_count(); }
  std::string Describe() const override { return disk_.Describe(); }

 private:
  class Writable final : public WritableFile {
   public:
    Writable(SyncDropper& owner, std::unique_ptr<WritableFile> file, std::string path)
        : owner_(owner), file_(std::move(file)), path_(std::move(path)) {}
    absl::Status Append(std::span<const std::byte> data) override { return file_->Append(data); }
    absl::Status Sync() override {
      return owner_.IsDropped("file " + path_) ? absl::OkStatus() : file_->Sync();
    }

   private:
    SyncDropper& owner_;
    const std::unique_ptr<WritableFile> file_;
    const std::string path_;
  };

  bool IsDropped(const std::string& what) {
    syncs_.push_back(what);
    return drops_(what, syncs_.size() - 1);
  }

  SimDisk& disk_;
  const Drops drops_;
  std::vector<std::string> syncs_;
  std::string last_image_;
};

// What the trainers were told.
struct Told {
  bool launched = false;              // attempt 1 has begun
  bool starts_from_nothing = false;   // its restore point
  std::optional<uint64_t> committed;  // newest step surviving power
};

Told RunJob(SimDisk& disk, SyncDropper& dropper) {
  EngineHarness harness(disk, {.root_exists = true, .file_system = &dropper, .ring = &dropper});
  Told told;
  const absl::StatusOr<std::vector<TestTrainer*>> trainers = harness.Launch(kRanks);
  if (!trainers.ok()) return told;
  told.launched = true;
  told.starts_from_nothing =
      harness.Restore(*(*trainers)[0]).status.code() == absl::StatusCode::kNotFound;
  for (const uint64_t step : {1, 2}) {
    for (TestTrainer* trainer : *trainers) harness.Save(*trainer, step);
    harness.Settle();
    for (TestTrainer* trainer : *trainers) {
      told.committed = std::max(told.committed, EngineHarness::CommittedPower(*trainer));
    }
  }
  return told;
}

// What of the promises a reader finds broken; empty: nothing.
std::string Broken(SimDisk& disk, const Told& told, const ReadBack& read_back) {
  const auto found = read_back.CheckAll(disk);
  if (!found.ok()) return std::string(found.status().message());
  if (told.committed.has_value() &&
      (found->empty() || Value(found->back().step) < *told.committed)) {
    return "less than was reported";
  }
  SimExecutor clock;
  FileStore store(disk, clock,
                  {.root = "/root", .writer = "r", .make_uuid = [] { return std::string(); }});
  if (told.launched && !store.NewestAttempt("job").ok()) return "the attempt is forgotten";
  if (told.starts_from_nothing && !store.GetRestorePoint("job", Attempt{1}).ok()) {
    return "the restore point is forgotten";
  }
  return "";
}

// The first broken promise over all cuts; empty: nobody misses what was dropped. `syncs`: those of
// the undisturbed run, if nothing is broken.
std::string FindBroken(const SyncDropper::Drops& drops, const ReadBack& read_back,
                       std::vector<std::string>* syncs = nullptr) {
  for (uint64_t cut_after = 0;; ++cut_after) {
    SimDisk disk;
    EXPECT_OK(disk.CreateDirectory("/root"));
    EXPECT_OK(disk.SyncDirectory("/"));
    disk.CutPowerAfter(cut_after);
    SyncDropper dropper(disk, drops);
    const Told told = RunJob(disk, dropper);
    const bool was_cut = disk.power_was_cut();
    if (!was_cut) disk.CutPowerNow();
    for (const Survivors& survivors : disk.LegalSurvivors()) {
      const std::unique_ptr<SimDisk> after = disk.RebootedCopy(survivors);
      std::string broken = Broken(*after, told, read_back);
      if (!broken.empty()) return broken;
    }
    if (was_cut) continue;
    if (syncs != nullptr) *syncs = dropper.syncs();
    return "";
  }
}

TEST(SyncMutation, EverySyncIsMissed) {
  const ReadBack read_back(kRanks);
  std::vector<std::string> syncs;
  ASSERT_EQ(FindBroken([](const std::string&, uint64_t) { return false; }, read_back, &syncs), "");
  ASSERT_GE(syncs.size(), 20u);
  uint64_t single_count = 0;
  for (uint64_t dropped = 0; dropped < syncs.size(); ++dropped) {
    const std::string& what = syncs[dropped];
    const std::string broken =
        FindBroken([&](const std::string&, uint64_t index) { return index == dropped; }, read_back);
    if (!broken.empty()) {
      ++single_count;
      std::printf("%s: %s\n", what.c_str(), broken.c_str());
      continue;
    }
    // Another sync of the same directory did it as well.
    EXPECT_EQ(what.find("/s0"), std::string::npos) << what << ": nobody misses it";
    const std::string together =
        FindBroken([&](const std::string& other, uint64_t) { return other == what; }, read_back);
    EXPECT_NE(together, "") << what << ": nobody misses it, nor all of it";
    std::printf("%s, all of them: %s\n", what.c_str(), together.c_str());
  }
  EXPECT_GE(single_count, 15u);
}

}  // namespace
}  // namespace holdfast
