// The C++ wrapper: one training loop through all of it.
#include <gtest/gtest.h>

#include <chrono>
#include <string>
#include <utility>
#include <vector>

#include "hook/holdfast.hpp"
#include "hook/test_agent.h"

namespace {

using holdfast::hook::TestAgent;
using holdfast::hook::TestDocument;
using holdfast::hook::TestPlan;
using holdfast::hook::TestRestore;
using namespace std::chrono_literals;

class WrapperTest : public ::testing::Test {
 protected:
  hf_open_options Options() {
    hf_open_options options = HF_OPEN_OPTIONS_INIT;
    options.job = "wrapped";
    options.rank = 0;
    options.world_size = 1;
    options.socket = agent_.socket_path().c_str();
    return options;
  }
  // Whether calls have held the training loop up since it was asked last.
  bool WasHeld() {
    const std::uint64_t now = agent_.page().held_ns.load();
    return std::exchange(held_ns_, now) != now;
  }
  TestAgent agent_;
  std::uint64_t held_ns_ = 0;
};

TEST_F(WrapperTest, ATrainingLoopFromRestoreToCommit) {
  agent_.SetDueEvery(2);
  TestPlan plan;
  plan.block_count = 2;
  plan.ops = {{0, 0, 40, 1, 0, 0, 0}, {4096, 0, 8, 1, 0, 1, 1}};
  plan.blobs = {{100, 64}, {200, 8}};
  agent_.SetPlan([plan](const TestDocument&) { return plan; });
  TestRestore restore;
  restore.step = 4;
  restore.world_size = 1;
  restore.map_bytes = {8};
  restore.pieces.resize(1);
  restore.pieces[0].map_id = 1;
  restore.pieces[0].bytes.assign(8, std::byte{1});
  restore.pieces[0].ops = {{0, 0, 8, 1, 0, 0, 1, 0}};
  const uint64_t cursor = 77;
  restore.blobs = {{"rng", HF_BLOB_RANK, 0, "seed"},
                   {"cursor", HF_BLOB_GLOBAL, 0,
                    std::string(reinterpret_cast<const char*>(&cursor), sizeof(cursor))}};
  agent_.SetRestore(restore);

  holdfast::Result<holdfast::Job> opened = holdfast::Job::Open(Options());
  ASSERT_TRUE(opened.ok()) << opened.error().text();
  holdfast::Job job = std::move(opened.value());
  std::vector<float> weights(10, 1.5f);
  std::vector<std::uint8_t> raw(8, 0);
  holdfast::Registration registration;
  registration.AddBuffer("param/w", weights.data(), weights.size());
  registration.AddBuffer("param/raw", static_cast<void*>(raw.data()), raw.size(), 1);
  registration.AddBlob("rng", holdfast::Scope::kRank, 64);
  registration.AddBlob("cursor", holdfast::Scope::kGlobal, 8);
  ASSERT_TRUE(job.Register("{}", registration, 30s).ok());
  EXPECT_EQ(agent_.document().buffers[0].bytes, 40u);
  EXPECT_EQ(agent_.document().buffers[1].bytes, 8u);

  const holdfast::Result<hf_restore_result> restored = job.Restore(30s);
  ASSERT_TRUE(restored.ok()) << restored.error().text();
  EXPECT_TRUE(WasHeld());
  EXPECT_EQ(restored.value().step, 4u);
  EXPECT_TRUE(agent_.last_selection().empty());
  ASSERT_TRUE(job.Restore({"w*"}, {}, 30s).ok());
  EXPECT_EQ(agent_.last_selection(),
            (std::vector<std::pair<std::uint32_t, std::string>>{{0, "w*"}}));
  EXPECT_EQ(raw, std::vector<std::uint8_t>(8, 1));
  EXPECT_EQ(job.RestoredBlob("rng").value().ToString(), "seed");
  EXPECT_EQ(job.RestoredBlob("cursor").value().As<std::uint64_t>(), 77u);
  EXPECT_EQ(job.RestoredBlob("cursor").value().As<std::uint32_t>(), std::nullopt);
  EXPECT_EQ(job.RestoredBlob("none").error().code(), HF_NOT_FOUND);

  {
    const holdfast::Section section(job, "forward");
    EXPECT_EQ(agent_.page().section_depth.load(), 1u);
    job.Heartbeat(5);
  }
  EXPECT_EQ(agent_.page().section_depth.load(), 0u);
  WasHeld();
  EXPECT_FALSE(job.Due(5));
  ASSERT_TRUE(job.Due(6));
  holdfast::Blobs blobs;
  const std::string next = "next";
  blobs.Add("rng", next);
  blobs.AddValue("cursor", cursor);
  EXPECT_FALSE(WasHeld());
  ASSERT_TRUE(job.Save(6, blobs).ok());
  EXPECT_TRUE(WasHeld());
  EXPECT_TRUE(job.WaitGroupCaptured(1, 30s).ok());
  EXPECT_TRUE(WasHeld());
  EXPECT_TRUE(job.WaitCaptured(holdfast::kForever).ok());
  EXPECT_EQ(agent_.BlobBytes(0, 0), 4u);
  EXPECT_EQ(agent_.BlobBytes(0, 1), 8u);
  agent_.Report(6, HF_SAVE_COMMITTED_POWER);
  WasHeld();
  EXPECT_TRUE(job.WaitCommitted(6, HF_SURVIVE_POWER, 30s).ok());
  EXPECT_TRUE(WasHeld());
  EXPECT_EQ(job.WaitCommitted(6, 1u << 5, 30s).code(), HF_UNIMPLEMENTED);
  EXPECT_EQ(job.Report()->state, HF_SAVE_COMMITTED_POWER);
  EXPECT_FALSE(job.Report(1).has_value());
  hf_save_report report = {};
  EXPECT_EQ(holdfast::DeviceBytesPerSecond(report), 0);
  EXPECT_EQ(holdfast::HiddenNs(report), 0);
  report.device_bytes = 3'000'000;
  report.device_ns = 1'500'000;
  report.capture_ns = 2'000'000;
  report.blocked_ns = 250'000;
  EXPECT_DOUBLE_EQ(holdfast::DeviceBytesPerSecond(report), 2e9);
  EXPECT_EQ(holdfast::HiddenNs(report), 1'750'000);
  report.blocked_ns = 2'000'001;
  EXPECT_EQ(holdfast::HiddenNs(report), 0);
  EXPECT_EQ(job.Info().committed_power_step, 6u);
  EXPECT_EQ(job.Info().image_bytes, 8192u);
}

TEST_F(WrapperTest, AJobEndsWithItsOwnerOnly) {
  {
    holdfast::Result<holdfast::Job> first = holdfast::Job::Open(Options());
    ASSERT_TRUE(first.ok());
    holdfast::Job moved = std::move(first.value());
    EXPECT_NE(moved.get(), nullptr);
    EXPECT_EQ(agent_.messages(holdfast::abi::MessageType::kClose), 0);
  }
  EXPECT_TRUE(agent_.AwaitMessages(holdfast::abi::MessageType::kClose, 1));
}

TEST(WrapperErrorTest, AFailedOpenIsAValue) {
  hf_open_options options = HF_OPEN_OPTIONS_INIT;
  options.job = "../escape";
  const holdfast::Result<holdfast::Job> opened = holdfast::Job::Open(options);
  ASSERT_FALSE(opened.ok());
  EXPECT_EQ(opened.error().code(), HF_INVALID_ARGUMENT);
  EXPECT_NE(opened.error().text().find("../escape"), std::string::npos) << opened.error().text();
}

}  // namespace
