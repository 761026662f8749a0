#include "format/manifest.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "base/crc32c.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

constexpr char kUuid[] = "01234567-89ab-cdef-0123-456789abcdef";
const absl::Time kTime = absl::FromUnixSeconds(1'800'000'000);

CheckpointId Id(uint32_t attempt, uint64_t step) { return {Attempt{attempt}, Step{step}}; }

Manifest Example() {
  Manifest manifest;
  manifest.job = "llm.7b";
  manifest.job_uuid = kUuid;
  manifest.checkpoint = Id(4, 1000);
  manifest.parent = Id(3, 900);
  manifest.world_size = 2;
  manifest.survives = {.process = true, .power = true, .nodes = 0};
  manifest.index_bytes = 1234;
  manifest.index_crc32c = 0xabcdef01;
  manifest.images = {{"rank-00000.h5", 8192, 0x01020304}, {"rank-00001.r1.h5", 4096, 0}};
  manifest.created_by = "holdfast 0.1.0";
  manifest.created_at = kTime;
  return manifest;
}

// Every member, for comparison.
std::string Show(const Manifest& m) {
  std::string text = absl::StrFormat(
      "%s %s %d/%d %s %d [%s] %d %08x %d %s %s", m.job, m.job_uuid, Value(m.checkpoint.attempt),
      Value(m.checkpoint.step),
      m.parent.has_value()
          ? absl::StrFormat("%d/%d", Value(m.parent->attempt), Value(m.parent->step))
          : "-",
      m.world_size, Describe(m.survives), m.index_bytes, m.index_crc32c,
      static_cast<int>(m.verification), m.created_by, absl::FormatTime(m.created_at));
  for (const ManifestImage& image : m.images) {
    absl::StrAppendFormat(&text, " %s:%d:%08x", image.file, image.bytes, image.checksum_root);
  }
  return text;
}

constexpr size_t kSealBytes = 22;  // "crc32c": "00000000"}\n

// `text` with another last line, that fits the bytes before.
std::string Reseal(const std::string& text) {
  const std::string sealed = text.substr(0, text.size() - kSealBytes);
  return absl::StrFormat("%s\"crc32c\": \"%08x\"}\n", sealed,
                         Crc32c(std::as_bytes(std::span(sealed))));
}

TEST(ManifestTest, IsThisText) {
  EXPECT_EQ(EncodeManifest(Example()), Reseal(R"({
"holdfast_manifest": 1,
"job": "llm.7b",
"job_uuid": "01234567-89ab-cdef-0123-456789abcdef",
"attempt": 4,
"step": 1000,
"parent": {"attempt": 3, "step": 900},
"world_size": 2,
"survives": ["process", "power"],
"index": {"bytes": 1234, "crc32c": "abcdef01"},
"images": [
{"file": "rank-00000.h5", "bytes": 8192, "checksum_root": "01020304"},
{"file": "rank-00001.r1.h5", "bytes": 4096, "checksum_root": "00000000"}],
"verification": "none",
"created_by": "holdfast 0.1.0",
"created_at": "2027-01-15T08:00:00Z",
"crc32c": "00000000"}
)"));
}

TEST(ManifestTest, ReadsBackWhatWasWritten) {
  std::vector<Manifest> manifests(4, Example());
  manifests[1].parent.reset();
  manifests[1].survives = {};
  manifests[1].verification = Verification::kAll;
  manifests[2].checkpoint = Id(UINT32_MAX, UINT64_MAX);
  manifests[2].parent = Id(UINT32_MAX, UINT64_MAX - 1);
  manifests[2].survives = {.process = false, .power = true, .nodes = 3};
  manifests[2].verification = Verification::kSample;
  manifests[3].created_by = "\"quotes\" \\ and\nlines, Grüße";
  manifests[3].created_at = absl::UnixEpoch();
  for (const Manifest& manifest : manifests) {
    ASSERT_OK_AND_ASSIGN(const Manifest read, DecodeManifest(EncodeManifest(manifest), "M"));
    EXPECT_EQ(Show(read), Show(manifest));
  }
}

// The bytes of each kind of file, and what reads them.
struct Sealed {
  std::string bytes;
  std::function<absl::Status(const std::string&)> decode;
};

std::vector<Sealed> AllSealed() {
  return {
      {EncodeManifest(Example()), [](const auto& b) { return DecodeManifest(b, "F").status(); }},
      {EncodeJobRecord({"llm.7b", kUuid, "holdfast 0.1.0", kTime}),
       [](const auto& b) { return DecodeJobRecord(b, "F").status(); }},
      {EncodeJobRecord({"llm.7b", kUuid, "holdfast 0.1.0", kTime,
                        JobSource{"llm", kUuid, Id(3, 900), "/a \"b\"/llm/s000000000900.a0003"}}),
       [](const auto& b) { return DecodeJobRecord(b, "F").status(); }},
      {EncodeBadMark({2, kUuid, Id(4, 1000), "NaN in \"wte\"", "holdfast 0.1.0", kTime}),
       [](const auto& b) { return DecodeBadMark(b, "F").status(); }},
      {EncodeHead({1, kUuid, Id(3, 900), Attempt{5}, "loss spike", "holdfast 0.1.0", kTime}),
       [](const auto& b) { return DecodeHead(b, "F").status(); }},
  };
}

TEST(SealedFilesTest, EveryTruncationAndEveryFlippedBitIsFound) {
  size_t checked = 0;
  for (const Sealed& file : AllSealed()) {
    ASSERT_OK(file.decode(file.bytes));
    for (size_t bytes = 0; bytes < file.bytes.size(); ++bytes) {
      EXPECT_THAT(file.decode(file.bytes.substr(0, bytes)),
                  StatusIs(absl::StatusCode::kDataLoss, HasSubstr("expected")))
          << bytes;
      ++checked;
    }
    for (size_t bit = 0; bit < 8 * file.bytes.size(); ++bit) {
      std::string flipped = file.bytes;
      flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ (1 << bit % 8));
      EXPECT_THAT(file.decode(flipped), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("F: ")))
          << bit;
      ++checked;
    }
    EXPECT_THAT(file.decode(file.bytes + "\n"), StatusIs(absl::StatusCode::kDataLoss));
    EXPECT_THAT(file.decode(file.bytes + file.bytes), StatusIs(absl::StatusCode::kDataLoss));
  }
  EXPECT_GT(checked, 10'000u);
}

// Whoever can write a file can also write its checksum: then strict reading is what is left. What
// still decodes must be something that we could have written.
TEST(SealedFilesTest, HostileBytesWithAGoodChecksumAreReadStrictly) {
  constexpr uint32_t kSeed = 4711;
  SCOPED_TRACE(absl::StrCat("seed ", kSeed));
  std::mt19937 random(kSeed);
  constexpr char kAlphabet[] = "{}[]\",:0123456789eE+-.ntf\\u \n\x7f\xff";
  size_t refused = 0;
  size_t read = 0;
  for (const Sealed& file : AllSealed()) {
    for (int i = 0; i < 5'000; ++i) {
      std::string bytes = file.bytes;
      for (uint32_t edits = 1 + random() % 3; edits > 0; --edits) {
        const size_t at = random() % (bytes.size() - kSealBytes);
        const char c = kAlphabet[random() % (sizeof(kAlphabet) - 1)];
        switch (random() % 3) {
          case 0:
            bytes[at] = c;
            break;
          case 1:
            bytes.insert(at, 1, c);
            break;
          default:
            bytes.erase(at, 1 + random() % 4);
            break;
        }
        if (bytes.size() < kSealBytes + 8) bytes = file.bytes;
      }
      bytes = Reseal(bytes);
      const absl::Status status = file.decode(bytes);
      (status.ok() ? read : refused) += 1;
      EXPECT_TRUE(status.ok() || status.code() == absl::StatusCode::kDataLoss) << status;
      if (const absl::StatusOr<Manifest> manifest = DecodeManifest(bytes, "M"); manifest.ok()) {
        EncodeManifest(*manifest);  // CHECKs that it reads back
      }
    }
  }
  EXPECT_GT(refused, 10'000u);
  EXPECT_GT(read, 100u);  // e.g. another digit in a number
}

TEST(ManifestTest, WrongMembersAreNamedWithExpectedAndFound) {
  const std::string good = EncodeManifest(Example());
  const auto error = [&good](const char* from, const std::string& to) {
    const std::string bad = Reseal(absl::StrReplaceAll(good, {{from, to}}));
    EXPECT_NE(bad, good) << from;
    return DecodeManifest(bad, "dir/MANIFEST.json").status();
  };
  const auto damaged = [](const std::string& a, const std::string& b) {
    return StatusIs(absl::StatusCode::kDataLoss,
                    AllOf(HasSubstr("dir/MANIFEST.json: "), HasSubstr(a), HasSubstr(b)));
  };
  EXPECT_THAT(error("manifest\": 1", "manifest\": 2"), damaged("format version 1", "2"));
  EXPECT_THAT(error("\"job\": \"llm.7b\",\n", ""), damaged("job", "expected"));
  EXPECT_THAT(error("\"job\": \"llm.7b\"", "\"job\": \"a/b\""), damaged("a/b", "expected"));
  EXPECT_THAT(error("\"step\": 1000", "\"step\": -1"), damaged("step", "-1"));
  EXPECT_THAT(error("\"step\": 1000", "\"step\": 1000, \"step\": 1000"), damaged("step", ""));
  EXPECT_THAT(error("\"step\": 1000", "\"stap\": 1000"), damaged("stap", "step"));
  EXPECT_THAT(error("\"attempt\": 4", "\"attempt\": 4294967296"), damaged("attempt", "4294967296"));
  EXPECT_THAT(error("\"step\": 900", "\"step\": 900, \"x\": 1"), damaged("parent", "x"));
  EXPECT_OK(error("\"attempt\": 3", "\"attempt\": 4"));  // 4/900, earlier than 4/1000
  EXPECT_THAT(error("{\"attempt\": 3, \"step\": 900}", "{\"attempt\": 4, \"step\": 1000}"),
              damaged("parent", "earlier"));
  EXPECT_THAT(error("size\": 2", "size\": 3"), damaged("images", "3 ranks"));
  EXPECT_THAT(error("\"power\"", "\"process\""), damaged("survives", "once"));
  EXPECT_THAT(error("\"power\"", "\"nodes=0\""), damaged("survives", "once"));
  EXPECT_THAT(error("\"power\"", "\"flood\""), damaged("survives", "once"));
  EXPECT_THAT(error("abcdef01", "ABCDEF01"), damaged("crc32c", "ABCDEF01"));
  EXPECT_THAT(error("abcdef01", "abcdef0"), damaged("crc32c", "8 small"));
  EXPECT_THAT(error("rank-00001.r1.h5", "../x"), damaged("image of rank 1", "../x"));
  EXPECT_THAT(error("rank-00001.r1.h5", "rank-00000.h5"), damaged("image of rank 1", "again"));
  EXPECT_THAT(error("\"none\"", "\"some\""), damaged("verification", "some"));
  EXPECT_THAT(error("08:00:00Z", "08:00:00"), damaged("created_at", "08:00:00"));
}

TEST(ManifestTest, ALargeGroupFitsItsLimit) {
  Manifest manifest = Example();
  manifest.world_size = 20'000;
  manifest.images.clear();
  for (uint32_t rank = 0; rank < manifest.world_size; ++rank) {
    manifest.images.push_back({ImageFileName(Rank{rank}, 1), INT64_MAX, rank});
  }
  const std::string bytes = EncodeManifest(manifest);
  ASSERT_OK_AND_ASSIGN(const Manifest read, DecodeManifest(bytes, "M"));
  EXPECT_EQ(read.images, manifest.images);
  EXPECT_LT(bytes.size() / manifest.world_size, kManifestBytesMax >> 20);
}

TEST(JobRecordTest, ReadsBackWithAndWithoutASource) {
  JobRecord record{"llm.7b", kUuid, "holdfast 0.1.0", kTime};
  EXPECT_EQ(DecodeJobRecord(EncodeJobRecord(record), "J")->source, std::nullopt);
  record.source = JobSource{"llm", "76543210-89ab-cdef-0123-456789abcdef", Id(3, 900),
                            std::string(kSourceBytesMax, 'd')};
  const std::string good = EncodeJobRecord(record);
  ASSERT_OK_AND_ASSIGN(const JobRecord found, DecodeJobRecord(good, "J"));
  EXPECT_EQ(found.source, record.source);
  EXPECT_EQ(found.job_uuid, record.job_uuid);
  const auto error = [&good](const char* from, const std::string& to) {
    const std::string bad = Reseal(absl::StrReplaceAll(good, {{from, to}}));
    EXPECT_NE(bad, good) << from;
    return DecodeJobRecord(bad, "J").status();
  };
  const auto damaged = [](const std::string& text) {
    return StatusIs(absl::StatusCode::kDataLoss, HasSubstr(text));
  };
  EXPECT_THAT(error("{\"job\": \"llm\"", "{\"job\": \"../llm\""), damaged("../llm"));
  EXPECT_THAT(error("\"76543210-", "\"7654321-"), damaged("7654321-"));
  EXPECT_THAT(error("\"attempt\": 3", "\"attempt\": 4294967296"), damaged("4294967296"));
  EXPECT_THAT(error("\"attempt\": 3, ", ""), damaged("attempt"));
  EXPECT_THAT(error("\"step\": 900", "\"step\": 900, \"x\": 1"), damaged("x"));
  EXPECT_THAT(error("\"ddd", "\"dddd"), damaged("16384"));
  EXPECT_THAT(error("\"source\": {", "\"source\": null, \"sauce\": {"), damaged("sauce"));
}

TEST(HeadTest, ReadsBackWithAndWithoutATarget) {
  for (const std::optional<CheckpointId>& to :
       {std::optional<CheckpointId>(Id(3, 900)), std::optional<CheckpointId>()}) {
    const Head head{7, kUuid, to, Attempt{5}, "because", "holdfast 0.1.0", kTime};
    ASSERT_OK_AND_ASSIGN(const Head read, DecodeHead(EncodeHead(head), "HEAD.7"));
    EXPECT_EQ(read.number, 7u);
    EXPECT_EQ(read.to, to);
    EXPECT_EQ(read.abandons_attempts_up_to, Attempt{5});
    EXPECT_EQ(read.reason, "because");
  }
}

TEST(BadMarkTest, ReadsBack) {
  const BadMark mark{1, kUuid, Id(4, 10), "NaN", "operator", kTime};
  ASSERT_OK_AND_ASSIGN(const BadMark read, DecodeBadMark(EncodeBadMark(mark), "BAD.1"));
  EXPECT_EQ(read.number, 1u);
  EXPECT_EQ(read.checkpoint, mark.checkpoint);
  EXPECT_EQ(read.reason, "NaN");
  EXPECT_EQ(read.created_by, "operator");
}

// Attempt 1: 10 - 20 - 30. Attempt 2 from 1/30: 40. HEAD to 1/20 abandons attempts up to 2. Attempt
// 3 from 1/20: 25 - 35.
TEST(LineageTest, AHeadAbandonsWhatCameAfterItsTarget) {
  const std::vector<LineageEntry> entries = {{Id(1, 10), std::nullopt}, {Id(1, 20), Id(1, 10)},
                                             {Id(1, 30), Id(1, 20)},    {Id(2, 40), Id(1, 30)},
                                             {Id(3, 25), Id(1, 20)},    {Id(3, 35), Id(3, 25)}};
  Head head;
  head.to = Id(1, 20);
  head.abandons_attempts_up_to = Attempt{2};
  EXPECT_EQ(CurrentBranch(entries, std::nullopt).size(), 6u);
  EXPECT_THAT(CurrentBranch(entries, head),
              ElementsAre(Id(1, 10), Id(1, 20), Id(3, 25), Id(3, 35)));
  // An attempt that began on the abandoned branch all the same is abandoned with it.
  std::vector<LineageEntry> stray = entries;
  stray.push_back({Id(4, 50), Id(2, 40)});
  stray.push_back({Id(4, 60), Id(4, 50)});
  EXPECT_THAT(CurrentBranch(stray, head), ElementsAre(Id(1, 10), Id(1, 20), Id(3, 25), Id(3, 35)));
  // Deleted since: the target's ancestors, the parent of a later one.
  const std::vector<LineageEntry> holes = {entries[0], entries[2], entries[5]};
  EXPECT_THAT(CurrentBranch(holes, head), ElementsAre(Id(3, 35)));
  // Back to nothing.
  head.to.reset();
  const std::vector<LineageEntry> again = {entries[0], entries[3], {Id(3, 5), std::nullopt}};
  EXPECT_THAT(CurrentBranch(again, head), ElementsAre(Id(3, 5)));
  EXPECT_THAT(CurrentBranch({}, head), IsEmpty());
}

}  // namespace
}  // namespace holdfast
