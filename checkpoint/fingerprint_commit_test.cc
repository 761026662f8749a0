// Fingerprints from the capture to `verify`: what a commit writes is what the formula says of the
// whole tensors, in every layout, through write errors and worker crashes; where they cannot be
// known the commit stands without; and verify finds by them what no checksum can.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/crc32c.h"
#include "checkpoint/commit.h"
#include "checkpoint/engine_testing.h"
#include "checkpoint/readback_testing.h"
#include "checkpoint/verify.h"
#include "format/fingerprint_oracle.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

constexpr uint64_t kStep = 7;
constexpr CheckpointId kId{Attempt{1}, Step{kStep}};
const std::string kDirectory = "/root/job/s000000000007.a0001";

// Tensor parallel over both dimensions and in the middle of three, ZeRO-1 inside of a tensor
// parallel shard, replicated, 0-d, empty, and two tensors of one shape.
std::string ParallelLayout(uint32_t tp, uint32_t dp) {
  return absl::StrFormat(
      R"({"holdfast_layout":1,"mesh":[{"axis":"tp","size":%d},{"axis":"dp","size":%d}],
      "placements":{
        "rows":[{"op":"shard","dim":0,"axis":"tp","rule":"balanced"}],
        "columns":[{"op":"shard","dim":1,"axis":"tp","rule":"balanced"}],
        "zero":[{"op":"shard","dim":1,"axis":"tp","rule":"balanced"},
                {"op":"flat","axis":"dp","rule":"balanced"}]},
      "tensors":[
      {"name":"up","shape":[12,50],"states":[
        {"state":"param","dtype":"bfloat16","place":"columns"},
        {"state":"exp_avg","dtype":"float32","place":"zero"}]},
      {"name":"down","shape":[50,12],"states":[{"state":"param","dtype":"float32","place":"rows"}]},
      {"name":"cube","shape":[3,5,70],"states":[{"state":"param","dtype":"int8","place":"columns"}]},
      {"name":"gain","shape":[13],"states":[{"state":"param","dtype":"float64"}]},
      {"name":"bias","shape":[13],"states":[{"state":"param","dtype":"float64"}]},
      {"name":"none","shape":[0,4],"states":[{"state":"param","dtype":"float16"}]},
      {"name":"steps","shape":[],"states":[{"state":"param","dtype":"int64"}]}]})",
      tp, dp);
}

// The same tensors, whole, each in a buffer of its own: what the bytes are, by the harness.
std::map<std::string, Fingerprint> Expected(uint64_t step) {
  std::string text = ParallelLayout(1, 1);
  for (const char* place :
       {",\"place\":\"columns\"", ",\"place\":\"zero\"", ",\"place\":\"rows\""}) {
    for (size_t at; (at = text.find(place)) != std::string::npos;) {
      text.erase(at, std::string(place).size());
    }
  }
  const std::unique_ptr<const Layout> layout = Layout::Parse(text).value();
  const RankLayout held = layout->ForRank(Rank{0}).value();
  const std::vector<std::vector<std::byte>> buffers = StateAfter(*layout, Rank{0}, step);
  std::map<std::string, Fingerprint> expected;
  for (const Segment& segment : held.segments) {
    const TensorState& state = layout->tensor_states()[segment.piece.tensor_state];
    CHECK(segment.piece.box == kWholeTensor && segment.piece.begin == 0 &&
          segment.piece.end == state.ElementCount());
    expected[Describe(state)] = OracleFingerprint(
        state,
        std::span(buffers[segment.buffer]).subspan(segment.buffer_offset_bytes, state.Bytes()));
  }
  for (const TensorState& state : layout->tensor_states()) {
    if (state.ElementCount() == 0) expected[Describe(state)] = OracleFingerprint(state, {});
  }
  return expected;
}

std::vector<TestTrainer*> Launch(EngineHarness& harness, uint32_t tp, uint32_t dp) {
  return harness.LaunchIn(ParallelLayout(tp, dp)).value();
}

// Commits kStep in this layout.
void MakeCheckpoint(SimDisk& disk, uint32_t tp, uint32_t dp) {
  EngineHarness harness(disk, {});
  const std::vector<TestTrainer*> trainers = Launch(harness, tp, dp);
  harness.SaveAll(trainers, kStep);
  ASSERT_EQ(EngineHarness::CommittedPower(*trainers[0]), kStep);
}

CatalogEntry Entry(SimDisk& disk) { return *ReadCatalog(disk, "/root", "job")->Find(kId); }

Index ReadIndex(SimDisk& disk) {
  return LoadIndex(disk, kDirectory, *Entry(disk).manifest).value();
}

VerifyReport Verify(SimDisk& disk) {
  return VerifyCheckpoint(disk, SimReadAt(disk), Entry(disk), VerifyOptions{}).value();
}

// "not computed" is left out.
std::map<std::string, Fingerprint> Found(const Index& index) {
  std::map<std::string, Fingerprint> found;
  for (size_t i = 0; i < index.facts.size(); ++i) {
    if (!index.facts[i].fingerprint.has_value()) continue;
    found[Describe(index.tensor_states[i])] = *index.facts[i].fingerprint;
  }
  return found;
}

void Replace(SimDisk& disk, const std::string& name, std::string_view bytes) {
  if (disk.Contents(kDirectory + "/" + name).ok()) disk.RemoveFile(kDirectory + "/" + name);
  disk.PutFile(kDirectory + "/" + name, std::string(bytes));
}

void ReplaceIndex(SimDisk& disk, const Index& index) {
  const std::vector<std::byte> bytes = EncodeIndex(index).value();
  Manifest manifest = *Entry(disk).manifest;
  manifest.index_bytes = bytes.size();
  manifest.index_crc32c = Crc32c(bytes);
  Replace(disk, "INDEX", {reinterpret_cast<const char*>(bytes.data()), bytes.size()});
  Replace(disk, "MANIFEST.json", EncodeManifest(manifest));
}

TEST(FingerprintCommit, EveryLayoutCommitsTheFingerprintsOfTheWholeTensors) {
  const std::map<std::string, Fingerprint> expected = Expected(kStep);
  EXPECT_EQ(expected.size(), 8u);
  EXPECT_NE(expected, Expected(kStep + 1));
  for (const auto& [tp, dp] :
       std::vector<std::pair<uint32_t, uint32_t>>{{1, 1}, {2, 1}, {3, 1}, {1, 2}, {1, 3}, {2, 2}}) {
    SCOPED_TRACE(absl::StrFormat("tp %d dp %d", tp, dp));
    SimDisk disk;
    MakeCheckpoint(disk, tp, dp);
    const Index index = ReadIndex(disk);
    EXPECT_EQ(Found(index), expected);
    EXPECT_EQ(index.boxes.size() > 0, tp > 1);
    const VerifyReport report = Verify(disk);
    EXPECT_EQ(report.verdict, Verdict::kGood);
    EXPECT_EQ(report.fingerprints_checked, expected.size());
    EXPECT_EQ(report.fingerprints_not_computed, 0u);
  }
}

// The next try begins the sums anew.
TEST(FingerprintCommit, AreRightAfterAWriteThatFailed) {
  const std::map<std::string, Fingerprint> expected = Expected(kStep);
  for (const SimDisk::Operation operation :
       {SimDisk::Operation::kRingWrite, SimDisk::Operation::kRingSync}) {
    uint64_t index = 0;
    for (;; ++index) {
      SimDisk disk;
      disk.FailOperation(operation, index, absl::DataLossError("EIO"));
      MakeCheckpoint(disk, 1, 2);
      if (disk.fault_count() == 0) break;
      ASSERT_EQ(Found(ReadIndex(disk)), expected) << "operation " << index;
      EXPECT_EQ(Verify(disk).verdict, Verdict::kGood);
    }
    EXPECT_GE(index, 2u);
  }
}

// Rank 0 is durable when the worker dies; its sums died with it.
void CrashBetweenRanks(SimDisk& disk, void (*in_between)(TestTrainer& rank0, uint32_t slot)) {
  EngineHarness harness(disk, {});
  const std::vector<TestTrainer*> trainers = Launch(harness, 1, 2);
  const std::optional<uint32_t> slot = harness.BeginSave(*trainers[0], kStep);
  ASSERT_TRUE(slot.has_value());
  harness.FinishSave(*trainers[0], *slot);
  harness.Settle();
  const auto report = trainers[0]->script->ReportOf(kStep);
  ASSERT_TRUE(report.has_value());
  ASSERT_EQ(report->blocks_flushed, report->block_count);
  in_between(*trainers[0], *slot);
  harness.CrashWorker(SimDisk::InFlight::kAll);
  ASSERT_TRUE(harness.Save(*trainers[1], kStep));
  harness.Settle();
  ASSERT_EQ(EngineHarness::CommittedPower(*trainers[1]), kStep);
}

TEST(FingerprintCommit, AreComputedAgainFromMemoryAfterAWorkerCrash) {
  SimDisk disk;
  CrashBetweenRanks(disk, [](TestTrainer&, uint32_t) {});
  EXPECT_EQ(Found(ReadIndex(disk)), Expected(kStep));
  EXPECT_EQ(Verify(disk).verdict, Verdict::kGood);
}

TEST(FingerprintCommit, TheCommitStandsWithoutThoseThatCannotBeKnown) {
  SimDisk disk;
  // The trainer writes into its image when it is durable already.
  CrashBetweenRanks(disk, [](TestTrainer& rank0, uint32_t slot) {
    rank0.script->Block(slot, rank0.script->block_count() - 1)[0] ^= std::byte{1};
  });
  const Index index = ReadIndex(disk);
  size_t unknown = 0;
  for (uint32_t i = 0; i < index.tensor_states.size(); ++i) {
    const auto [first, last] = index.PiecesOf(i);
    bool has_piece_in_0 = false;
    for (size_t k = first; k < last; ++k) has_piece_in_0 |= index.pieces[k].image == 0;
    EXPECT_EQ(index.facts[i].fingerprint.has_value(), !has_piece_in_0);
    unknown += has_piece_in_0 ? 1 : 0;
    if (has_piece_in_0) continue;
    EXPECT_EQ(index.facts[i].fingerprint, Expected(kStep)[Describe(index.tensor_states[i])]);
  }
  EXPECT_GT(unknown, 0u);
  EXPECT_LT(unknown, index.tensor_states.size());
  const VerifyReport report = Verify(disk);
  EXPECT_EQ(report.verdict, Verdict::kGood);
  EXPECT_EQ(report.fingerprints_not_computed, unknown);
}

// A worker died between INDEX and MANIFEST.json, and the next one knows more or fewer fingerprints.
TEST(FingerprintCommit, AnIndexThatIsThereAlreadyStandsIfItOnlyKnowsOtherFingerprints) {
  SimDisk disk;
  MakeCheckpoint(disk, 1, 2);
  const Index full = ReadIndex(disk);
  const Manifest manifest = *Entry(disk).manifest;
  CommitRequest request;
  request.job_directory = "/root/job";
  request.writer = "next";
  request.parent = manifest.parent;
  request.created_at = manifest.created_at;
  // `there` is in place, and `index` shall be committed.
  const auto commit = [&](const Index& there, const Index& index) {
    Replace(disk, "MANIFEST.json", EncodeManifest(manifest));
    ReplaceIndex(disk, there);
    disk.RemoveFile(kDirectory + "/MANIFEST.json");
    return CommitCheckpoint(disk, request, index);
  };
  Index some = full;
  some.facts[2] = {};
  Index none = full;
  none.facts.assign(none.facts.size(), {});
  const std::vector<const Index*> all = {&full, &some, &none};
  for (const Index* there : all) {
    for (const Index* index : all) {
      ASSERT_OK(commit(*there, *index));
      EXPECT_EQ(Found(ReadIndex(disk)), Found(*there));
      EXPECT_EQ(Verify(disk).verdict, Verdict::kGood);
    }
  }
  Index wrong = some;
  wrong.facts[1].fingerprint = *wrong.facts[1].fingerprint + Fingerprint(1);
  EXPECT_THAT(commit(wrong, full), StatusIs(absl::StatusCode::kAlreadyExists));
  Index other = none;
  other.images[0].block_crc32c[0] ^= 1;
  EXPECT_THAT(commit(other, full), StatusIs(absl::StatusCode::kAlreadyExists));
}

TEST(FingerprintVerify, AWrongFingerprintIsNamed) {
  SimDisk disk;
  MakeCheckpoint(disk, 2, 1);
  Index index = ReadIndex(disk);
  const uint32_t at = index.FindTensorState("up", "exp_avg").value();
  const Fingerprint right = *index.facts[at].fingerprint;
  index.facts[at].fingerprint = right + Fingerprint(1);
  ReplaceIndex(disk, index);
  const VerifyReport report = Verify(disk);
  EXPECT_EQ(report.verdict, Verdict::kDamaged);
  ASSERT_EQ(report.findings.size(), 1u);
  EXPECT_THAT(report.findings[0].tensors, ElementsAre("up (exp_avg)"));
  EXPECT_THAT(report.findings[0].text,
              AllOf(HasSubstr("tensor \"up\", state \"exp_avg\": expected fingerprint " +
                              (right + Fingerprint(1)).Hex()),
                    HasSubstr("found " + right.Hex())));
  EXPECT_EQ(report.fingerprints_checked, index.tensor_states.size() - 1);
}

// Every block has its checksum, and the pieces cover every tensor; only they are not where INDEX
// says.
TEST(FingerprintVerify, PiecesThatAreExchangedAreFound) {
  SimDisk disk;
  MakeCheckpoint(disk, 1, 1);
  Index index = ReadIndex(disk);
  IndexPiece& gain = index.pieces[index.PiecesOf(*index.FindTensorState("gain", "param")).first];
  IndexPiece& bias = index.pieces[index.PiecesOf(*index.FindTensorState("bias", "param")).first];
  std::swap(gain.offset_bytes, bias.offset_bytes);
  ReplaceIndex(disk, index);
  const VerifyReport report = Verify(disk);
  EXPECT_EQ(report.verdict, Verdict::kDamaged);
  ASSERT_EQ(report.findings.size(), 2u);
  EXPECT_THAT(report.findings[0].tensors, ElementsAre("bias (param)"));
  EXPECT_THAT(report.findings[1].tensors, ElementsAre("gain (param)"));
}

TEST(FingerprintVerify, WithoutFingerprintsItSaysSo) {
  SimDisk disk;
  MakeCheckpoint(disk, 2, 1);
  Index index = ReadIndex(disk);
  index.facts.assign(index.facts.size(), {});
  index.facts[0].undefined_fingerprint.emplace();
  ReplaceIndex(disk, index);
  const VerifyReport report = Verify(disk);
  EXPECT_EQ(report.verdict, Verdict::kGood);
  EXPECT_EQ(report.fingerprints_checked, 0u);
  EXPECT_EQ(report.fingerprints_not_computed, index.tensor_states.size());
}

// Damage is reported once, by its block; the others are still compared.
TEST(FingerprintVerify, ADamagedTensorIsNotComparedAsWell) {
  SimDisk disk;
  MakeCheckpoint(disk, 1, 1);
  const Index index = ReadIndex(disk);
  const uint64_t block = index.pieces[0].offset_bytes / 4096;
  disk.FlipBit(kDirectory + "/rank-00000.h5", index.pieces[0].offset_bytes, 0);
  const VerifyReport report = Verify(disk);
  EXPECT_EQ(report.verdict, Verdict::kDamaged);
  EXPECT_EQ(report.findings.size(), 1u);
  const std::vector<std::string> touched =
      TensorsAt(index, 0, block * 4096, (block + 1) * 4096, 100);
  uint64_t states_touched = 0;
  for (const std::string& name : touched) states_touched += name.starts_with("blob ") ? 0 : 1;
  EXPECT_EQ(report.fingerprints_checked, index.tensor_states.size() - states_touched);
  EXPECT_GT(report.fingerprints_checked, 0u);
}

}  // namespace
}  // namespace holdfast
