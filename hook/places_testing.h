// Tests of capture that hold wherever the tensors lie: in host memory, in a device's (the fake
// driver's, or a real one's), or some here and some there.
#ifndef HOLDFAST_HOOK_PLACES_TESTING_H_
#define HOLDFAST_HOOK_PLACES_TESTING_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "hook/device_testing.h"
#include "hook/source_reader.h"
#include "hook/test_agent.h"
#include "hook/test_job.h"

namespace holdfast::hook {

enum class Places { kHost, kDevice, kMix };

// The suite in all three. Those in host memory come first: in a process without a driver still.
#define HOLDFAST_TEST_EVERYWHERE(Suite)                                        \
  INSTANTIATE_TEST_SUITE_P(Host, Suite, ::testing::Values(Places::kHost));     \
  INSTANTIATE_TEST_SUITE_P(Device, Suite, ::testing::Values(Places::kDevice)); \
  INSTANTIATE_TEST_SUITE_P(Mix, Suite, ::testing::Values(Places::kMix))

// Reads like HostSourceReader; once it is held, only as many pieces as are permitted.
class GatedReader final : public SourceReader {
 public:
  void Read(std::byte* target, const std::byte* source, uint64_t run_bytes, uint64_t count,
            uint64_t stride) override {
    {
      std::unique_lock lock(mutex_);
      ++arrived_;
      ++waiting_;
      changed_.wait(lock, [&] { return !held_ || permits_ > 0; });
      --waiting_;
      if (held_) --permits_;
    }
    host_.Read(target, source, run_bytes, count, stride);
  }
  Result<bool> Equal(const std::byte* copy, const std::byte* source, uint64_t run_bytes,
                     uint64_t count, uint64_t stride) override {
    return host_.Equal(copy, source, run_bytes, count, stride);
  }
  void Hold() {
    std::lock_guard lock(mutex_);
    held_ = true;
    permits_ = 0;
  }
  void Permit(uint64_t pieces) {
    std::lock_guard lock(mutex_);
    permits_ += pieces;
    changed_.notify_all();
  }
  void Open() {
    std::lock_guard lock(mutex_);
    held_ = false;
    changed_.notify_all();
  }
  uint64_t arrived() {
    std::lock_guard lock(mutex_);
    return arrived_;
  }
  // Somebody waits in a read.
  bool is_waited_for() {
    std::lock_guard lock(mutex_);
    return waiting_ > 0;
  }

 private:
  HostSourceReader host_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool held_ = false;
  uint64_t permits_ = 0;
  uint64_t arrived_ = 0;
  int waiting_ = 0;
};

// One job and its agent. In a mix one of two neighbouring buffers lies on the device.
//
// The gate: once held, copiers get on piece by piece, as the test permits. A piece is a read of
// host memory (kCopyPieceBytes at most) or one copy of the device. With one copier thread, which
// waits in a read, buffers on the device are to come last.
class PlacesTest : public ::testing::TestWithParam<Places> {
 protected:
  void SetUp() override {
    seed_ = std::random_device()();
    random_.seed(seed_);
    RecordProperty("seed", std::to_string(seed_));
    if (GetParam() == Places::kHost) return;
    std::string why;
    devices_ = TestDevices::Open(&why);
    if (devices_ == nullptr) GTEST_SKIP() << why;
    if (fake() != nullptr) fake()->Reset(seed_);
  }
  void TearDown() override {
    LetAllThrough();
    job_.reset();
    placed_.reset();
  }

  FakeCuda* fake() const { return devices_ == nullptr ? nullptr : devices_->fake(); }

  void Open(uint32_t threads = 1, CheckSource check = CheckSource::kNone,
            int64_t head_start_ns = 0) {
    Settings settings = TestSettings(agent_);
    settings.capture_head_start_ns = head_start_ns;
    settings.copy_threads = threads;
    settings.check_source = check;
    Result<std::unique_ptr<Job>> job = OpenTestJob(settings, &gate_);
    ASSERT_TRUE(job.ok()) << job.error().text();
    job_ = std::move(job.value());
  }

  using Packing = PlacedBuffers::Packing;
  // nullptr: in host memory, all of them.
  std::unique_ptr<PlacedBuffers> Place(TestBuffers& buffers, Packing packing = Packing::kEach) {
    if (devices_ == nullptr) return nullptr;
    const auto place_of = [this](size_t i) {
      return GetParam() == Places::kDevice || i % 2 == mixed_device_ ? 0 : PlacedBuffers::kHost;
    };
    return std::make_unique<PlacedBuffers>(*devices_, buffers, place_of, TestDevices::Kind::kPlain,
                                           packing);
  }
  void Register(TestBuffers& buffers, const TestPlan& plan,
                const std::vector<hf_blob_slot>& blobs = {}, Packing packing = Packing::kEach) {
    agent_.SetPlan([plan](const TestDocument&) { return plan; });
    std::unique_ptr<PlacedBuffers> placed = Place(buffers, packing);
    const Error error = job_->Register("{\"holdfast_layout\": 1}",
                                       placed == nullptr ? buffers.List() : placed->list(), blobs,
                                       Deadline::After(kPatienceNs));
    ASSERT_TRUE(error.ok()) << error.text();
    placed_ = std::move(placed);
  }
  bool IsOnDevice(size_t buffer) const {
    return placed_ != nullptr && placed_->place(buffer) != PlacedBuffers::kHost;
  }
  // What the registered buffers hold has changed in `buffers`; so it does where they lie.
  void Upload(const TestBuffers& buffers) {
    for (size_t i = 0; placed_ != nullptr && i < buffers.count(); ++i) placed_->Upload(i);
  }
  Error Wait(int32_t group = HF_ALL_GROUPS) {
    return job_->WaitCaptured(group, Deadline::After(kPatienceNs));
  }

  // ---- The gate

  // False, and the test is skipped: a real device does not wait for permits.
  bool Hold() {
    if (devices_ != nullptr && fake() == nullptr) return false;
    gate_.Hold();
    if (fake() != nullptr) fake()->HoldCopies(FakeCuda::Copies::kToHost);
    return true;
  }
  // Of those that come, of buffers in the same kind of memory as this one.
  void Permit(size_t buffer, uint64_t pieces) {
    if (IsOnDevice(buffer)) {
      fake()->PermitCopies(pieces);
    } else {
      gate_.Permit(pieces);
    }
  }
  // In both kinds of memory.
  void PermitEverywhere(uint64_t pieces) {
    gate_.Permit(pieces);
    if (fake() != nullptr) fake()->PermitCopies(pieces);
  }
  // Pieces of so many blocks of the buffer, which are nothing else.
  uint64_t Pieces(size_t buffer, uint64_t blocks, uint64_t block_bytes) const {
    return IsOnDevice(buffer) ? blocks
                              : blocks * ((block_bytes + kCopyPieceBytes - 1) / kCopyPieceBytes);
  }
  uint64_t arrived() {
    return gate_.arrived() + (fake() == nullptr ? 0 : fake()->copies_arrived());
  }
  // The piece of this number waits to be let through, and every block before it is finished.
  bool AwaitArrivals(uint64_t count) {
    if (!agent_.Await([&] { return arrived() >= count; })) return false;
    if (fake() == nullptr || gate_.is_waited_for()) return true;
    // A look of the copier's finishes one block at most; two may have begun before.
    const int64_t looks = Looks();
    return agent_.Await([&] { return Looks() >= looks + 2 + static_cast<int64_t>(count); });
  }
  void LetAllThrough() {
    gate_.Open();
    if (fake() != nullptr) fake()->Reset(seed_);
  }

  uint32_t seed_ = 0;
  std::mt19937 random_;
  TestDevices* devices_ = nullptr;  // nullptr: everything lies in host memory
  size_t mixed_device_ = 1;         // in a mix: buffers with i % 2 of this lie on the device
  TestAgent agent_;
  GatedReader gate_;
  std::unique_ptr<PlacedBuffers> placed_;
  std::unique_ptr<Job> job_;

 private:
  int64_t Looks() const {
    const std::vector<FakeCuda::Call> calls = fake()->calls();
    return std::count_if(calls.begin(), calls.end(),
                         [](const FakeCuda::Call& call) { return call.name == "cuEventQuery"; });
  }
};

}  // namespace holdfast::hook

#endif  // HOLDFAST_HOOK_PLACES_TESTING_H_
