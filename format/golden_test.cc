// The golden checkpoint of format 1 (tests/data/golden-v1, written once by tests/golden) is
// readable for ever, value by value (P10). If this test fails, the code is wrong, not the data: the
// files are never regenerated.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/crc32c.h"
#include "format/image.h"
#include "format/index.h"
#include "format/layout.h"
#include "format/manifest.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

using testing::ElementsAre;

const std::string kRoot = HOLDFAST_SOURCE_DIR "/tests/data/golden-v1";
const std::string kJobDirectory = kRoot + "/golden.job-1";
const std::string kDirectory = kJobDirectory + "/s000000000042.a0003";
constexpr char kUuid[] = "c0ffee00-1234-4abc-8def-0123456789ab";
constexpr CheckpointId kCheckpoint{Attempt{3}, Step{42}};

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  EXPECT_TRUE(file.good()) << path;
  return std::string(std::istreambuf_iterator<char>(file), {});
}

std::span<const std::byte> Bytes(const std::string& text) { return std::as_bytes(std::span(text)); }

// What the generator wrote for byte `byte` of element `element` of the whole tensor; `number` is
// the place of the tensor state in the layout document.
uint8_t GoldenByte(Dtype dtype, uint64_t number, uint64_t element, uint64_t byte) {
  if (dtype == Dtype::kBool) return static_cast<uint8_t>(element % 2);
  return static_cast<uint8_t>(element * 31 + byte * 7 + number * 53 + 1);
}

// Row-major number in the whole tensor of element `element` of the piece's box.
uint64_t ElementOfTensor(const Index& index, const Piece& piece, uint64_t element) {
  if (piece.box == kWholeTensor) return element;
  const BoxView box = index.boxes[piece.box];
  const std::vector<uint64_t>& shape = index.tensor_states[piece.tensor_state].shape;
  uint64_t number = 0;
  uint64_t weight = 1;
  for (size_t d = shape.size(); d-- > 0;) {
    number += weight * (box.lo[d] + element % box.size[d]);
    element /= box.size[d];
    weight *= shape[d];
  }
  return number;
}

class GoldenTest : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_OK_AND_ASSIGN(manifest_,
                         DecodeManifest(ReadFile(kDirectory + "/MANIFEST.json"), "MANIFEST.json"));
    const std::string bytes = ReadFile(kDirectory + "/INDEX");
    ASSERT_OK(CheckIndexBytes(manifest_, Bytes(bytes)));
    ASSERT_OK_AND_ASSIGN(index_, DecodeIndex(Bytes(bytes)));
    ASSERT_OK(CheckConsistent(manifest_, index_));
    for (const IndexImage& image : index_.images) {
      images_.push_back(ReadFile(kDirectory + "/" + image.file));
    }
  }

  std::string Tensor(const std::string& tensor, const std::string& state) const;

  Manifest manifest_;
  Index index_;
  std::vector<std::string> images_;
};

// All bytes of a tensor state, put together from its pieces; fails unless each comes exactly once.
std::string GoldenTest::Tensor(const std::string& tensor, const std::string& state) const {
  const std::optional<uint32_t> at = index_.FindTensorState(tensor, state);
  EXPECT_TRUE(at.has_value()) << tensor << " " << state;
  if (!at.has_value()) return "";
  const TensorState& tensor_state = index_.tensor_states[*at];
  const uint64_t element_bytes = ElementBytes(tensor_state.dtype);
  std::string bytes(tensor_state.Bytes(), '\0');
  std::vector<int> times(tensor_state.ElementCount(), 0);
  const auto [first, last] = index_.PiecesOf(*at);
  for (size_t i = first; i < last; ++i) {
    const IndexPiece& piece = index_.pieces[i];
    uint64_t from = piece.offset_bytes;
    for (uint64_t e = piece.piece.begin; e < piece.piece.end; ++e, from += element_bytes) {
      const uint64_t number = ElementOfTensor(index_, piece.piece, e);
      bytes.replace(number * element_bytes, element_bytes,
                    images_[piece.image].substr(from, element_bytes));
      ++times[number];
    }
  }
  EXPECT_THAT(times, testing::Each(1)) << tensor << " " << state;
  return bytes;
}

TEST_F(GoldenTest, ManifestSaysWhatWasWritten) {
  EXPECT_EQ(manifest_.job, "golden.job-1");
  EXPECT_EQ(manifest_.job_uuid, kUuid);
  EXPECT_EQ(manifest_.checkpoint, kCheckpoint);
  EXPECT_EQ(manifest_.parent, (CheckpointId{Attempt{2}, Step{40}}));
  EXPECT_EQ(manifest_.world_size, 2u);
  EXPECT_EQ(manifest_.survives, (FaultSet{.process = true, .power = true, .nodes = 0}));
  EXPECT_EQ(manifest_.verification, Verification::kNone);
  EXPECT_EQ(manifest_.created_by, "holdfast 0.1.0");
  EXPECT_EQ(manifest_.created_at, absl::FromUnixSeconds(1'800'000'000));
  EXPECT_THAT(manifest_.images, ElementsAre(ManifestImage{"rank-00000.h5", 16384, 0x957d17a8},
                                            ManifestImage{"rank-00001.r1.h5", 16384, 0x77a0a576}));
}

TEST_F(GoldenTest, SmallRecordsSayWhatWasWritten) {
  ASSERT_OK_AND_ASSIGN(const JobRecord job,
                       DecodeJobRecord(ReadFile(kJobDirectory + "/JOB.json"), "JOB.json"));
  EXPECT_EQ(job.job, "golden.job-1");
  EXPECT_EQ(job.job_uuid, kUuid);
  ASSERT_OK_AND_ASSIGN(const Head head, DecodeHead(ReadFile(kJobDirectory + "/HEAD.1"), "HEAD.1"));
  EXPECT_EQ(head.number, 1u);
  EXPECT_EQ(head.to, kCheckpoint);
  EXPECT_EQ(head.abandons_attempts_up_to, Attempt{5});
  EXPECT_EQ(head.reason, "the loss went up");
  ASSERT_OK_AND_ASSIGN(const BadMark bad, DecodeBadMark(ReadFile(kRoot + "/BAD.1"), "BAD.1"));
  EXPECT_EQ(bad.checkpoint, kCheckpoint);
  EXPECT_EQ(bad.reason, "NaN in \"embed\"");
}

TEST_F(GoldenTest, EveryBlockHasItsChecksum) {
  for (size_t i = 0; i < images_.size(); ++i) {
    const IndexImage& image = index_.images[i];
    ASSERT_EQ(images_[i].size(), image.bytes);
    EXPECT_EQ(image.block_bytes, 4096u);
    for (size_t block = 0; block < image.block_crc32c.size(); ++block) {
      EXPECT_EQ(Crc32c(Bytes(images_[i]).subspan(4096 * block, 4096)), image.block_crc32c[block])
          << image.file << " block " << block;
    }
    EXPECT_EQ(images_[i].substr(0, 8), "\x89HDF\r\n\x1a\n");
  }
}

TEST_F(GoldenTest, EveryElementHasItsValue) {
  const struct {
    const char* tensor;
    const char* state;
    Dtype dtype;
    std::vector<uint64_t> shape;
  } expected[] = {
      {"embed/wte.weight", "param", Dtype::kBfloat16, {16, 8}},
      {"embed/wte.weight", "exp_avg", Dtype::kFloat32, {16, 8}},
      {"embed", "param", Dtype::kFloat8E4m3fn, {7}},
      {"h.0.attn", "param", Dtype::kFloat32, {6, 4}},
      {"scale", "param", Dtype::kFloat64, {}},
      {"empty", "param", Dtype::kInt32, {0, 3}},
      {"mask", "param", Dtype::kBool, {5}},
      {"größe", "param", Dtype::kInt64, {3}},
  };
  ASSERT_EQ(index_.tensor_states.size(), std::size(expected));
  for (uint64_t number = 0; number < std::size(expected); ++number) {
    const auto& [tensor, state, dtype, shape] = expected[number];
    SCOPED_TRACE(absl::StrCat(tensor, " ", state));
    const std::string bytes = Tensor(tensor, state);
    const TensorState& found = index_.tensor_states[*index_.FindTensorState(tensor, state)];
    EXPECT_EQ(found.dtype, dtype);
    EXPECT_EQ(found.shape, shape);
    const uint64_t element_bytes = ElementBytes(dtype);
    for (uint64_t k = 0; k < bytes.size(); ++k) {
      ASSERT_EQ(static_cast<uint8_t>(bytes[k]),
                GoldenByte(dtype, number, k / element_bytes, k % element_bytes))
          << "byte " << k;
    }
  }
}

TEST_F(GoldenTest, FactsThatAreKnownAndThoseThatAreNot) {
  for (uint32_t i = 0; i < index_.tensor_states.size(); ++i) {
    TensorFacts expected;
    if (index_.tensor_states[i].tensor == "embed/wte.weight") {
      if (index_.tensor_states[i].state == "param") {
        // Made up before the function was defined.
        expected.undefined_fingerprint.emplace().fill(std::byte{0x5A});
        expected.non_finite_count = 7;
      } else {
        expected.marks = 0;
      }
    }
    EXPECT_EQ(index_.facts[i], expected) << index_.tensor_states[i].tensor;
  }
}

TEST_F(GoldenTest, BlobsHaveTheirBytes) {
  std::map<std::string, std::string> found;
  for (const IndexBlob& blob : index_.blobs) {
    found[absl::StrCat(std::string(BlobScopeName(blob.scope)), " ", blob.name, " ",
                       Value(blob.rank))] =
        images_[blob.image].substr(blob.offset_bytes, blob.bytes);
  }
  EXPECT_EQ(found, (std::map<std::string, std::string>{{"global args 0", "--seed 1 --lr 3e-4"},
                                                       {"rank rng 0", "random state of rank 0"},
                                                       {"rank rng 1", "random state of rank 1"}}));
}

TEST_F(GoldenTest, ItsLayoutParsesAndNamesTheSameTensors) {
  ASSERT_EQ(index_.layouts.size(), 1u);
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<const Layout> layout,
                       Layout::Parse(index_.layouts[0]));
  EXPECT_EQ(layout->world_size(), 2u);
  for (const TensorState& tensor_state : layout->tensor_states()) {
    EXPECT_TRUE(index_.FindTensorState(tensor_state.tensor, tensor_state.state).has_value());
  }
}

}  // namespace
}  // namespace holdfast
