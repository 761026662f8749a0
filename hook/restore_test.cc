// Restore: what the agent delivers reaches the buffers, and nothing else does.
#include "hook/restore.h"

#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <utility>

#include "hook/test_agent.h"
#include "hook/test_job.h"
#include "hook/test_restore.h"

namespace holdfast::hook {
namespace {

class RestoreTest : public ::testing::Test {
 protected:
  void SetUp() override {
    Result<std::unique_ptr<Job>> job = OpenTestJob(TestSettings(agent_), &reader_);
    ASSERT_TRUE(job.ok()) << job.error().text();
    job_ = std::move(job.value());
  }
  void Register(TestBuffers& buffers) {
    TestPlan plan;
    plan.block_count = 64;
    agent_.SetPlan([plan](const TestDocument&) { return plan; });
    ASSERT_TRUE(RegisterAll(*job_, buffers).ok());
  }
  Error Restore() { return job_->Restore({}, &result_, Deadline::After(kPatienceNs)); }

  TestAgent agent_;
  HostSourceReader reader_;
  std::unique_ptr<Job> job_;
  hf_restore_result result_ = {};
};

void ExpectEqual(const TestBuffers& found, const TestBuffers& expected) {
  for (size_t i = 0; i < found.count(); ++i) {
    EXPECT_EQ(FirstDifference(found.data(i), expected.data(i)), -1) << "buffer " << i;
  }
}

TEST_F(RestoreTest, RandomDeliveriesEqualTheOracleAlsoWhenTheWorkerDiesInBetween) {
  const uint32_t seed = std::random_device()();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  int deaths = 0;
  for (int round = 0; round < 40; ++round) {
    SCOPED_TRACE("round " + std::to_string(round));
    TestBuffers buffers = RandomBuffers(random, 1 + random() % 8, 3000);
    Register(buffers);
    TestRestore script = RandomRestore(random, buffers, random() % 150, 3);
    // The rank's memory is 64 blocks of two slots.
    if (round % 3 == 0 && !script.pieces.empty()) {
      script.die_after = 1 + random() % script.pieces.size();
      ++deaths;
    }
    agent_.SetRestore(script);
    TestBuffers expected = buffers;
    Apply(script, &expected);
    const int before = agent_.messages(abi::MessageType::kRestore);
    const Error restored = Restore();
    ASSERT_TRUE(restored.ok()) << restored.text();
    ExpectEqual(buffers, expected);
    EXPECT_EQ(result_.step, 77u);
    EXPECT_EQ(result_.attempt, 3u);
    EXPECT_EQ(result_.world_size, 4u);
    EXPECT_EQ(result_.bytes_from_memory, result_.bytes / 2);
    EXPECT_EQ(agent_.messages(abi::MessageType::kRestore) - before,
              script.die_after.has_value() ? 2 : 1);
  }
  EXPECT_GT(deaths, 3);
}

TEST_F(RestoreTest, WhatIsChosenIsAskedOfTheAgentAndWhatItSaysIsReported) {
  std::mt19937 random(8);
  TestBuffers buffers = RandomBuffers(random, 3, 100);
  Register(buffers);
  TestRestore script;
  script.tensor_states = 3;
  script.tensor_states_left_out = 4;
  script.restore_from = HF_RESTORE_FROM_USED;
  agent_.SetRestore(script);
  ASSERT_TRUE(Restore().ok());
  EXPECT_TRUE(agent_.last_selection().empty());
  EXPECT_EQ(result_.tensor_states, 3u);
  EXPECT_EQ(result_.tensor_states_left_out, 4u);
  EXPECT_EQ(result_.restore_from, HF_RESTORE_FROM_USED);

  const std::string longest(4096, 'x');
  const std::vector<const char*> tensors = {"layers.*", longest.c_str()};
  const std::vector<const char*> states = {"param"};
  hf_restore_options options = {sizeof(options), tensors.data(), 2, states.data(), 1, nullptr, 0};
  const auto restore = [&] {
    return job_->Restore(options, &result_, Deadline::After(kPatienceNs));
  };
  // Also by the worker that comes after the one that was asked first.
  script.pieces.resize(1);
  script.die_after = 1;
  agent_.SetRestore(script);
  ASSERT_TRUE(restore().ok());
  const std::vector<std::pair<uint32_t, std::string>> asked = {
      {0, "layers.*"}, {0, longest}, {1, "param"}};
  EXPECT_EQ(agent_.last_selection(), asked);

  // An answer that is none.
  script = TestRestore();
  script.restore_from = 3;
  agent_.SetRestore(script);
  EXPECT_EQ(restore().code(), HF_INTERNAL);

  const int before = agent_.messages(abi::MessageType::kRestore);
  const std::string too_long(4097, 'x');
  const std::vector<const char*> many(1001, "a");
  const hf_restore_options wrong[] = {
      {sizeof(options), nullptr, 1, nullptr, 0, nullptr, 0},
      {sizeof(options), nullptr, 0, nullptr, 1, nullptr, 0},
      {sizeof(options), many.data(), 1001, nullptr, 0, nullptr, 0},
      {sizeof(options), many.data(), 500, many.data(), 501, nullptr, 0},
      {sizeof(options), many.data(), 1, nullptr, SIZE_MAX, nullptr, 0}};
  for (const hf_restore_options& each : wrong) {
    options = each;
    EXPECT_EQ(restore().code(), HF_INVALID_ARGUMENT);
  }
  for (const char* text : {static_cast<const char*>(nullptr), "", too_long.c_str()}) {
    options = {sizeof(options), &text, 1, nullptr, 0, nullptr, 0};
    EXPECT_EQ(restore().code(), HF_INVALID_ARGUMENT);
  }
  EXPECT_EQ(agent_.messages(abi::MessageType::kRestore), before);
}

TEST_F(RestoreTest, NothingToRestoreIsNotFoundAndTouchesNothing) {
  std::mt19937 random(2);
  TestBuffers buffers = RandomBuffers(random, 3, 100);
  const TestBuffers before = buffers;
  Register(buffers);
  EXPECT_EQ(Restore().code(), HF_NOT_FOUND);
  ExpectEqual(buffers, before);
}

TEST_F(RestoreTest, BeforeARegistrationOrDuringACaptureItIsRefused) {
  EXPECT_EQ(Restore().code(), HF_FAILED_PRECONDITION);
}

TEST_F(RestoreTest, ErrorsOfTheAgentAreReturnedWithTheirText) {
  std::mt19937 random(3);
  TestBuffers buffers = RandomBuffers(random, 2, 100);
  Register(buffers);
  TestRestore script;
  script.done_code = HF_DATA_LOSS;
  agent_.SetRestore(script);
  const Error lost = Restore();
  EXPECT_EQ(lost.code(), HF_DATA_LOSS);
  EXPECT_STREQ(lost.text(), "the script's end of the restore");
  script.reply_code = HF_DATA_LOSS;
  agent_.SetRestore(script);
  EXPECT_EQ(Restore().code(), HF_DATA_LOSS);
  // A code with a meaning of its own inside the library does not make it go on for ever.
  script.reply_code = HF_ABORTED;
  agent_.SetRestore(script);
  EXPECT_EQ(Restore().code(), HF_INTERNAL);
  script.reply_code = HF_OK;
  script.done_code = HF_ABORTED;
  agent_.SetRestore(script);
  EXPECT_EQ(Restore().code(), HF_INTERNAL);
  script.done_code = HF_OK;
  agent_.SetRestore(script);
  EXPECT_TRUE(Restore().ok());
}

// Whatever the agent says, no byte outside the buffers and the maps is touched: every field that is
// used as an offset or index is wrong once.
TEST_F(RestoreTest, WrongOffsetsOfTheAgentAreRefused) {
  std::mt19937 random(4);
  TestBuffers buffers;
  buffers.Add("b", 100, 0, random);
  Register(buffers);
  const auto make = [&] {
    TestRestore script;
    script.map_bytes = {500};
    TestRestore::Piece piece;
    piece.map_id = 1;
    piece.bytes = std::vector<std::byte>(50);
    piece.ops.push_back({10, 20, 5, 4, 10, 20, 0, 0});
    script.pieces.push_back(piece);
    return script;
  };
  agent_.SetRestore(make());
  ASSERT_TRUE(Restore().ok());
  using Change = std::function<void(TestRestore::Piece&)>;
  const std::vector<Change> changes = {
      [](auto& piece) { piece.map_id = 2; },
      [](auto& piece) { piece.map_id = UINT32_MAX; },
      [](auto& piece) { piece.offset = 451; },
      [](auto& piece) { piece.offset = UINT64_MAX - 10; },
      [](auto& piece) { piece.ops[0].buffer_index = 1; },
      [](auto& piece) { piece.ops[0].source_offset = 16; },
      [](auto& piece) { piece.ops[0].source_offset = UINT64_MAX; },
      [](auto& piece) { piece.ops[0].source_stride = 12; },
      [](auto& piece) { piece.ops[0].source_stride = UINT64_MAX / 2; },
      [](auto& piece) { piece.ops[0].buffer_offset = 36; },
      [](auto& piece) { piece.ops[0].buffer_stride = 26; },
      [](auto& piece) { piece.ops[0].run_bytes = 21; },
      [](auto& piece) { piece.ops[0].run_bytes = UINT64_MAX; },
      [](auto& piece) { piece.ops[0].count = 6; },
      [](auto& piece) { piece.ops[0].count = UINT64_MAX; },
  };
  for (size_t i = 0; i < changes.size(); ++i) {
    TestRestore script = make();
    changes[i](script.pieces[0]);
    agent_.SetRestore(script);
    const Error error = Restore();
    EXPECT_EQ(error.code(), HF_INTERNAL) << "change " << i << ": " << error.text();
  }
  // Each time the agent was told that nobody waits any more.
  EXPECT_TRUE(
      agent_.AwaitMessages(abi::MessageType::kRestoreCancel, static_cast<int>(changes.size())));
  agent_.SetRestore(make());
  EXPECT_TRUE(Restore().ok());
}

TEST_F(RestoreTest, ARestoreThatDoesNotEndIsLeftAtTheDeadlineAndCanBeRepeated) {
  std::mt19937 random(5);
  TestBuffers buffers;
  buffers.Add("b", 100, 0, random);
  Register(buffers);
  TestRestore script;
  agent_.SetRestore(script);
  agent_.FailNext(abi::MessageType::kRestore, TestAgent::Fault::kSilence);
  EXPECT_EQ(job_->Restore({}, &result_, Deadline::After(0)).code(), HF_DEADLINE_EXCEEDED);
  // One that reached the agent.
  while (agent_.messages(abi::MessageType::kRestore) == 0) {
    const Error late = job_->Restore({}, &result_, Deadline::After(kNsPerMs));
    // The silence may have been for the one before.
    EXPECT_TRUE(late.ok() || late.code() == HF_DEADLINE_EXCEEDED) << late.text();
  }
  EXPECT_TRUE(Restore().ok());
}

// Wherever a restore is left, the agent hears of it: before its reply, while pieces are missing,
// and where its memories cannot be mapped.
TEST_F(RestoreTest, TheAgentIsToldOfEveryRestoreThatIsLeft) {
  std::mt19937 random(6);
  TestBuffers buffers;
  buffers.Add("b", 100, 0, random);
  Register(buffers);
  TestRestore good;
  good.map_bytes = {500};
  // A restore that ends as it should comes behind every message before it.
  const auto cancels = [&] {
    agent_.SetRestore(good);
    EXPECT_TRUE(Restore().ok());
    return agent_.messages(abi::MessageType::kRestoreCancel);
  };
  EXPECT_EQ(cancels(), 0);
  const auto leave = [&](const TestRestore& script) {
    const int cancels_before = cancels();
    const int before = agent_.messages(abi::MessageType::kRestore);
    agent_.SetRestore(script);
    hf_code code = HF_OK;
    // A deadline that short may pass before the request was sent.
    while (agent_.messages(abi::MessageType::kRestore) == before) {
      code = job_->Restore({}, &result_, Deadline::After(kNsPerMs)).code();
    }
    EXPECT_NE(code, HF_OK);
    EXPECT_GT(cancels(), cancels_before);
  };
  TestRestore script = good;
  script.never_ends = true;
  leave(script);
  script.never_ends = false;
  script.map_is_short = true;
  script.map_bytes = {uint64_t{1} << 62};
  leave(script);
  // Silence: it was left before its reply.
  const int before = cancels();
  const int asked = agent_.messages(abi::MessageType::kRestore);
  agent_.FailNext(abi::MessageType::kRestore, TestAgent::Fault::kSilence);
  while (agent_.messages(abi::MessageType::kRestore) == asked) {
    // The silence may have been for the one before, so this may even succeed.
    (void)job_->Restore({}, &result_, Deadline::After(kNsPerMs));
  }
  EXPECT_GT(cancels(), before);
}

TEST_F(RestoreTest, BlobsAreFoundByNameScopeAndRank) {
  TestBuffers none;
  Register(none);
  TestRestore script;
  script.world_size = 4;
  script.blobs = {{"args", HF_BLOB_GLOBAL, 0, "seen"},
                  {"rng", HF_BLOB_RANK, 0, "r0"},
                  {"rng", HF_BLOB_RANK, 2, "r2"},
                  {"empty", HF_BLOB_RANK, 2, ""}};
  const auto find = [&](const char* name, int64_t rank) -> std::pair<int, std::string> {
    Result<std::span<const std::byte>> blob = job_->RestoredBlob(name, rank);
    if (!blob.ok()) return {blob.error().code(), blob.error().text()};
    return {HF_OK,
            std::string(reinterpret_cast<const char*>(blob.value().data()), blob.value().size())};
  };
  EXPECT_EQ(find("args", -1).first, HF_FAILED_PRECONDITION);
  agent_.SetRestore(script);
  ASSERT_TRUE(Restore().ok());
  EXPECT_EQ(find("args", -1), (std::pair<int, std::string>(HF_OK, "seen")));
  EXPECT_EQ(find("rng", -1), (std::pair<int, std::string>(HF_OK, "r2")));  // this rank is 2
  EXPECT_EQ(find("rng", 0), (std::pair<int, std::string>(HF_OK, "r0")));
  EXPECT_EQ(find("rng", 1).first, HF_NOT_FOUND);
  EXPECT_EQ(find("empty", -1), (std::pair<int, std::string>(HF_OK, "")));
  EXPECT_EQ(find("ar", -1).first, HF_NOT_FOUND);
  EXPECT_EQ(find("args", 0).first, HF_NOT_FOUND);

  script.world_size = 3;
  agent_.SetRestore(script);
  ASSERT_TRUE(Restore().ok());
  EXPECT_EQ(find("rng", -1).first, HF_INVALID_ARGUMENT);
  EXPECT_EQ(find("rng", 2), (std::pair<int, std::string>(HF_OK, "r2")));
  EXPECT_EQ(find("args", -1).first, HF_OK);
}

TEST(RestoredBlobSetTest, WrongMemoriesAreRefused) {
  const auto make = [](auto change) {
    struct Contents {
      abi::RestoredBlobs header;
      abi::RestoredBlob blob;
      char text[8];
    } contents = {{abi::kProtocolMagic, abi::kProtocolVersion, 1},
                  {sizeof(abi::RestoredBlobs) + sizeof(abi::RestoredBlob), 56, 8, 4, 0, 0, 0},
                  "name"};
    change(contents);
    auto memory = TestMemory::Make(sizeof(contents));
    std::memcpy(memory->data(), &contents, sizeof(contents));
    Result<Mapping> mapping =
        Mapping::Map(memory->fd(), sizeof(contents), Mapping::Access::kRead, "test");
    return RestoredBlobSet::Make(std::move(mapping.value()), 1).ok();
  };
  EXPECT_TRUE(make([](auto&) {}));
  EXPECT_FALSE(make([](auto& c) { c.header.magic = 0; }));
  EXPECT_FALSE(make([](auto& c) { c.header.version = 9; }));
  EXPECT_FALSE(make([](auto& c) { c.header.blob_count = 2; }));
  EXPECT_FALSE(make([](auto& c) { c.header.blob_count = UINT64_MAX; }));
  EXPECT_FALSE(make([](auto& c) { c.blob.name_offset = 61; }));
  EXPECT_FALSE(make([](auto& c) { c.blob.name_bytes = 9; }));
  EXPECT_FALSE(make([](auto& c) { c.blob.data_offset = UINT64_MAX; }));
  EXPECT_FALSE(make([](auto& c) { c.blob.data_bytes = UINT64_MAX; }));
  EXPECT_FALSE(RestoredBlobSet::Make(Mapping(), 1).ok());
}

}  // namespace
}  // namespace holdfast::hook
