// Images as other tools see them: the file is assembled exactly as the agent does it (stamped head,
// payload at the template's offsets, zeros elsewhere) and read by h5py and h5dump.
#include "format/image.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <random>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "nlohmann/json.hpp"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

using testing::HasSubstr;

constexpr char kUuid[] = "01234567-89ab-cdef-0123-456789abcdef";
constexpr CheckpointId kCheckpoint{Attempt{7}, Step{123456789012}};

class ImageTest : public testing::Test {
 protected:
  ImageTest() : directory_(absl::StrCat(testing::TempDir(), "/image_test.", getpid())) {
    std::filesystem::create_directories(directory_);
  }
  ~ImageTest() override { std::filesystem::remove_all(directory_); }

  // Adds a tensor state and, if it has elements to store, a piece that is all of it.
  uint32_t Add(const std::string& tensor, const std::string& state, Dtype dtype,
               std::vector<uint64_t> shape) {
    tensor_states_.push_back({tensor, state, dtype, std::move(shape)});
    const auto index = static_cast<uint32_t>(tensor_states_.size() - 1);
    pieces_.push_back({index, kWholeTensor, 0, tensor_states_.back().ElementCount()});
    return index;
  }

  ImageSpec Spec() const {
    ImageSpec spec;
    spec.job = "job.1";
    spec.job_uuid = kUuid;
    spec.rank = Rank{2};
    spec.world_size = 4;
    spec.block_bytes = 4096;
    spec.layout_json = layout_;
    spec.tensor_states = tensor_states_;
    spec.pieces = pieces_;
    spec.boxes = &boxes_;
    spec.blobs = blobs_;
    return spec;
  }

  absl::StatusOr<ImageTemplate> Build() const { return ImageTemplate::Build(Spec(), directory_); }

  uint64_t BytesOf(const Piece& piece) const {
    return piece.ElementCount() * ElementBytes(tensor_states_[piece.tensor_state].dtype);
  }

  // The bytes of the element pattern: every byte value occurs, so every 8-bit float does.
  static char PatternByte(Dtype dtype, uint64_t k) {
    if (dtype == Dtype::kBool) return static_cast<char>((k * 7 / 3) % 2);
    if (dtype == Dtype::kBfloat16 || dtype == Dtype::kFloat16) {
      return static_cast<char>(k % 2 == 0 ? k / 2 : k / 2 >> 8);  // element i is the number i
    }
    return static_cast<char>(k * 131 + (k >> 8) * 7 + 1);
  }

  // Writes the image; of a tensor larger than 1 MiB only the last 64 bytes, the rest stays sparse.
  std::string Write(const ImageTemplate& image, std::span<const uint64_t> blob_bytes) const;
  // Compares `path` with this image by image_test_reader.py; its output.
  std::string ReadByH5py(const ImageTemplate& image, const std::string& path,
                         std::span<const uint64_t> blob_bytes) const;
  nlohmann::json ExpectedDataset(const ImageTemplate& image, size_t piece_index,
                                 size_t number) const;

  const std::string directory_;
  std::string layout_ = R"({"holdfast_layout": 1, "note": "Zürich"})";
  std::vector<TensorState> tensor_states_;
  std::vector<Piece> pieces_;
  BoxTable boxes_;
  std::vector<ImageBlob> blobs_;
};

std::string BlobText(size_t blob, uint64_t bytes) {
  std::string text;
  for (uint64_t i = 0; i < bytes; ++i) text.push_back(static_cast<char>('a' + (blob + i) % 26));
  return text;
}

std::string ImageTest::Write(const ImageTemplate& image,
                             std::span<const uint64_t> blob_bytes) const {
  const std::string path = directory_ + "/image.h5";
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  std::vector<std::byte> head(image.head_bytes());
  image.StampHead({kCheckpoint, blob_bytes}, 0, head);
  file.write(reinterpret_cast<const char*>(head.data()), static_cast<std::streamsize>(head.size()));
  for (size_t i = 0; i < pieces_.size(); ++i) {
    const uint64_t bytes = BytesOf(pieces_[i]);
    if (bytes == 0) continue;
    const uint64_t from = bytes > 1 << 20 ? bytes - 64 : 0;
    std::string payload;
    for (uint64_t k = from; k < bytes; ++k) {
      payload.push_back(PatternByte(tensor_states_[pieces_[i].tensor_state].dtype, k));
    }
    file.seekp(static_cast<std::streamoff>(image.piece_offsets()[i] + from));
    file.write(payload.data(), static_cast<std::streamsize>(payload.size()));
  }
  for (size_t i = 0; i < blobs_.size(); ++i) {
    if (blob_bytes[i] == kBlobAbsent) continue;
    file.seekp(static_cast<std::streamoff>(image.blob_offsets()[i]));
    file << BlobText(i, blob_bytes[i]);
  }
  file.close();
  EXPECT_TRUE(file.good());
  std::filesystem::resize_file(path, image.image_bytes());
  return path;
}

nlohmann::json ImageTest::ExpectedDataset(const ImageTemplate& image, size_t piece_index,
                                          size_t number) const {
  const Piece& piece = pieces_[piece_index];
  const TensorState& tensor_state = tensor_states_[piece.tensor_state];
  nlohmann::json want;
  want["path"] =
      absl::StrCat("/tensors/", EscapeName(tensor_state.state), "/",
                   EscapeName(tensor_state.tensor), number > 0 ? absl::StrCat(".g", number) : "");
  want["name"] = tensor_state.tensor;
  want["dtype"] = std::string(DtypeName(tensor_state.dtype));
  want["shape"] = tensor_state.shape;
  want["range"] = {piece.begin, piece.end};
  std::vector<uint64_t> whole = tensor_state.shape;
  if (piece.box != kWholeTensor) {
    const BoxView box = boxes_[piece.box];
    want["box_lo"] = std::vector<uint64_t>(box.lo.begin(), box.lo.end());
    whole.assign(box.size.begin(), box.size.end());
    want["box_size"] = whole;
  }
  uint64_t elements = 1;
  for (const uint64_t extent : whole) elements *= extent;
  const bool is_whole = piece.begin == 0 && piece.end == elements;
  want["dataset_shape"] = is_whole ? whole : std::vector<uint64_t>{piece.end - piece.begin};
  want["offset"] = image.piece_offsets()[piece_index];
  want["bytes"] = BytesOf(piece);
  want["tail_only"] = BytesOf(piece) > 1 << 20;
  return want;
}

std::string RunAndCapture(const std::string& command, int* exit_status) {
  FILE* pipe = popen((command + " 2>&1").c_str(), "r");
  std::string output;
  char buffer[4096];
  for (size_t n = 0; (n = fread(buffer, 1, sizeof(buffer), pipe)) > 0;) output.append(buffer, n);
  *exit_status = pclose(pipe);
  return output;
}

// What is missing to run the tools, or nothing.
std::string MissingTool() {
  int status = 0;
  RunAndCapture("/usr/bin/python3 -c 'import h5py'", &status);
  if (status != 0) return "python3-h5py (for /usr/bin/python3) is missing";
  RunAndCapture("h5dump --version", &status);
  return status == 0 ? "" : "h5dump (hdf5-tools) is missing";
}

std::string ImageTest::ReadByH5py(const ImageTemplate& image, const std::string& path,
                                  std::span<const uint64_t> blob_bytes) const {
  nlohmann::json expected;
  expected["attributes"] = {{"format_version", 1},
                            {"job", "job.1"},
                            {"job_uuid", kUuid},
                            {"rank", 2},
                            {"world_size", 4},
                            {"writer", std::string(WriterVersion())},
                            {"attempt", Value(kCheckpoint.attempt)},
                            {"step", Value(kCheckpoint.step)}};
  expected["layout"] = layout_;
  expected["datasets"] = nlohmann::json::array();
  expected["states"] = nlohmann::json::array();
  expected["blobs"] = nlohmann::json::array();
  std::map<uint32_t, size_t> pieces_of_state;
  std::set<std::string> states;
  for (size_t i = 0; i < pieces_.size(); ++i) {
    const uint32_t tensor_state = pieces_[i].tensor_state;
    expected["datasets"].push_back(ExpectedDataset(image, i, pieces_of_state[tensor_state]++));
    states.insert(tensor_states_[tensor_state].state);
  }
  for (const std::string& state : states) expected["states"].push_back(state);
  for (size_t i = 0; i < blobs_.size(); ++i) {
    expected["blobs"].push_back(
        {{"path", absl::StrCat("/blobs/", std::string(BlobScopeName(blobs_[i].scope)), "/",
                               EscapeName(blobs_[i].name),
                               blobs_[i].saved_by.has_value()
                                   ? absl::StrCat(".rank", Value(*blobs_[i].saved_by))
                                   : "")},
         {"name", blobs_[i].name},
         {"saved_by", blobs_[i].saved_by.has_value() ? nlohmann::json(Value(*blobs_[i].saved_by))
                                                     : nlohmann::json(nullptr)},
         {"bytes", blob_bytes[i]},
         {"capacity", blobs_[i].capacity_bytes},
         {"contents", blob_bytes[i] == kBlobAbsent ? "" : BlobText(i, blob_bytes[i])}});
  }
  const std::string expected_path = directory_ + "/expected.json";
  std::ofstream(expected_path) << expected.dump();
  int status = 0;
  std::string output = RunAndCapture(
      absl::StrCat("/usr/bin/python3 " HOLDFAST_SOURCE_DIR "/format/image_test_reader.py ", path,
                   " ", expected_path),
      &status);
  EXPECT_EQ(status, 0) << output;
  return output;
}

TEST_F(ImageTest, H5pyAndH5dumpReadEveryDtypeNameAndPiece) {
  if (const std::string missing = MissingTool(); !missing.empty()) GTEST_SKIP() << missing;
  for (const std::string_view name : DtypeNames()) {
    const uint64_t elements = name == "bfloat16" || name == "float16" ? 65536 : 256;
    Add(absl::StrCat("all of ", std::string(name)), "param", *DtypeFromName(name), {elements});
    Add(absl::StrCat("0-d ", std::string(name)), "param", *DtypeFromName(name), {});
  }
  for (const char* name : {"a", "a/b", "a.b", "a/b/c", ".", "..", "/", "//", "%2F", "a%2Fb", " ",
                           "Größe/重み.\U0001F9CA", "tab\tnewline\n", "a.g1"}) {
    Add(name, "param", Dtype::kInt32, {3, 2});
    Add(name, "exp/avg.sq", Dtype::kFloat64, {1});
  }
  Add(std::string(4096, 'x'), "param", Dtype::kUint8, {5});
  Add(std::string(4096, '/'), "param", Dtype::kUint8, {5});
  Add(std::string(4094, '.') + "é", std::string(4096, '.'), Dtype::kUint8, {5});
  Add("empty", "param", Dtype::kFloat32, {0});
  Add("empty in the middle", "param", Dtype::kFloat32, {4, 0, 3});
  Add("32 dimensions", "param", Dtype::kInt16, std::vector<uint64_t>(32, 1));
  Add("over 4 GiB", "param", Dtype::kFloat32, {(uint64_t{1} << 30) + 17});
  Add("behind it", "param", Dtype::kInt64, {7});
  const uint32_t wide = Add("a", "momentum", Dtype::kInt32, {6, 10});
  pieces_.pop_back();
  pieces_.push_back({wide, kWholeTensor, 0, 13});
  pieces_.push_back({wide, kWholeTensor, 20, 21});
  const uint64_t lo[] = {2, 5};
  const uint64_t size[] = {3, 5};
  pieces_.push_back({wide, boxes_.Add(lo, size), 0, 15});
  pieces_.push_back({wide, 0, 4, 9});
  blobs_ = {{BlobScope::kGlobal, "args", 1000},
            {BlobScope::kRank, "rng/cuda", 64},
            {BlobScope::kRank, "args", 0},
            {BlobScope::kGlobal, "not given", 10},
            {BlobScope::kRank, "rng/cuda", 20, Rank{0}},
            {BlobScope::kRank, "rng/cuda", 0, Rank{5}},
            {BlobScope::kRank, "rng/cuda.rank5", 3}};
  const uint64_t blob_bytes[] = {17, 64, 0, kBlobAbsent, 20, 0, 3};

  ASSERT_OK_AND_ASSIGN(const ImageTemplate image, Build());
  const std::string path = Write(image, blob_bytes);
  EXPECT_THAT(ReadByH5py(image, path, blob_bytes),
              HasSubstr(absl::StrCat(pieces_.size(), " datasets, 7 blobs")));

  int status = 0;
  const std::string header = RunAndCapture("h5dump -H " + path, &status);
  EXPECT_EQ(status, 0);
  EXPECT_THAT(header, HasSubstr("DATASET \"a%2Fb%2Fc\""));
  const std::string dump = RunAndCapture("h5dump -d /tensors/momentum/a.g1 " + path, &status);
  EXPECT_EQ(status, 0);
  EXPECT_THAT(dump, HasSubstr("(0): -1979218943"));  // bytes 01 84 07 8a of the pattern
}

// Payload lies in order, aligned and without room between: what the flush and the capture plan rely
// on.
TEST_F(ImageTest, PayloadFollowsTheHeadInOrderAlignedAndDense) {
  constexpr uint32_t kSeed = 20240917;
  SCOPED_TRACE(absl::StrCat("seed ", kSeed));
  std::mt19937 random(kSeed);
  for (int round = 0; round < 12; ++round) {
    tensor_states_.clear();
    pieces_.clear();
    blobs_.clear();
    const size_t count = round == 0 ? 0 : random() % 300;
    for (size_t i = 0; i < count; ++i) {
      const auto dtype = *DtypeFromNumber(static_cast<uint8_t>(1 + random() % 15));
      const uint64_t extent = random() % (i % 3 == 0 ? 5 : 3000);
      Add(absl::StrCat("t", i), absl::StrCat("s", i % 3), dtype, {extent});
    }
    for (size_t i = 0; i < random() % 5; ++i) {
      blobs_.push_back({BlobScope::kRank, absl::StrCat("b", i), random() % 100});
    }
    ASSERT_OK_AND_ASSIGN(const ImageTemplate image, Build());
    uint64_t end = image.head_bytes();
    EXPECT_EQ(end % kImageAlignmentBytes, 0u);
    const auto place = [&](uint64_t offset, uint64_t bytes) {
      if (bytes == 0) {
        EXPECT_EQ(offset, image.head_bytes());
        return;
      }
      EXPECT_EQ(offset,
                (end + kImageAlignmentBytes - 1) / kImageAlignmentBytes * kImageAlignmentBytes);
      end = offset + bytes;
    };
    for (size_t i = 0; i < pieces_.size(); ++i)
      place(image.piece_offsets()[i], BytesOf(pieces_[i]));
    for (size_t i = 0; i < blobs_.size(); ++i) {
      place(image.blob_offsets()[i], blobs_[i].capacity_bytes);
    }
    EXPECT_EQ(image.image_bytes(), (end + 4095) / 4096 * 4096);
    // Room in the head that nothing uses would be written with every save.
    EXPECT_LT(image.head_bytes(), 9000 + 1400 * count) << count << " datasets";
  }
}

TEST_F(ImageTest, TheSameSpecGivesTheSameBytes) {
  for (int i = 0; i < 200; ++i) Add(absl::StrCat("t", i), "param", Dtype::kFloat32, {3, 5});
  blobs_ = {{BlobScope::kRank, "rng", 100}};
  const uint64_t blob_bytes[] = {9};
  std::vector<std::byte> heads[2];
  for (std::vector<std::byte>& head : heads) {
    ASSERT_OK_AND_ASSIGN(const ImageTemplate image, Build());
    head.resize(image.head_bytes());
    image.StampHead({kCheckpoint, blob_bytes}, 0, head);
  }
  EXPECT_EQ(heads[0], heads[1]);
  EXPECT_TRUE(std::filesystem::is_empty(directory_)) << "the scratch file is left behind";
}

TEST_F(ImageTest, AHeadStampedInPiecesIsTheHeadStampedAtOnce) {
  Add("t", "param", Dtype::kFloat32, {3, 5});
  blobs_ = {{BlobScope::kRank, "rng", 100}, {BlobScope::kGlobal, "args", 1 << 20}};
  const uint64_t blob_bytes[] = {0x64, 0xABCDE};
  ASSERT_OK_AND_ASSIGN(const ImageTemplate image, Build());
  std::vector<std::byte> whole(image.head_bytes());
  const ImageStamp stamp{{Attempt{0xA1B2C3D4}, Step{0x0102030405060708}}, blob_bytes};
  image.StampHead(stamp, 0, whole);
  for (const size_t piece_bytes : {size_t{1}, size_t{3}, size_t{64}, size_t{4096}}) {
    std::vector<std::byte> pieces(image.head_bytes());
    for (size_t at = 0; at < pieces.size(); at += piece_bytes) {
      const size_t bytes = std::min(piece_bytes, pieces.size() - at);
      image.StampHead(stamp, at, std::span(pieces).subspan(at, bytes));
    }
    EXPECT_EQ(pieces, whole) << piece_bytes;
  }
}

// The mark that cells are found by may stand in a shape by chance: the image must be built with
// another mark then, and come out as if the first had served.
TEST_F(ImageTest, AShapeThatLooksLikeACellIsNoCell) {
  Add("t", "param", Dtype::kUint8, {uint64_t{0xC1FEF8FF}});
  ASSERT_OK_AND_ASSIGN(const ImageTemplate image, Build());
  std::vector<std::byte> head(image.head_bytes());
  image.StampHead({kCheckpoint, {}}, 0, head);
  const std::byte extent[] = {std::byte{0xFF}, std::byte{0xF8}, std::byte{0xFE}, std::byte{0xC1}};
  EXPECT_NE(std::search(head.begin(), head.end(), std::begin(extent), std::end(extent)),
            head.end());
}

TEST_F(ImageTest, WhatCannotBeStoredIsRefusedByName) {
  const auto error = [this](const auto& change) {
    ImageSpec spec = Spec();
    change(spec);
    return ImageTemplate::Build(spec, directory_).status();
  };
  const auto invalid = [](const char* text) {
    return StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(text));
  };
  Add("t", "param", Dtype::kFloat32, {4});
  EXPECT_THAT(error([](ImageSpec& s) { s.job = "a/b"; }), invalid("\"a/b\""));
  EXPECT_THAT(error([](ImageSpec& s) { s.job_uuid = "x"; }), invalid("\"x\""));
  EXPECT_THAT(error([](ImageSpec& s) { s.block_bytes = 5000; }), invalid("found 5000"));
  EXPECT_THAT(error([](ImageSpec& s) { s.block_bytes = 2048; }), invalid("found 2048"));
  EXPECT_THAT(error([](ImageSpec& s) { s.rank = Rank{4}; }), invalid("found 4"));
  EXPECT_THAT(error([](ImageSpec& s) { s.layout_json = ""; }), invalid("layout"));
  EXPECT_THAT(error([](ImageSpec& s) {
                s.blobs = {{BlobScope::kRank, "rng", 1}, {BlobScope::kRank, "rng", 2}};
              }),
              invalid("blob \"rng\" of scope rank is given twice"));
  EXPECT_THAT(error([](ImageSpec& s) { s.blobs = {{BlobScope::kRank, "", 1}}; }), invalid("blob"));
  EXPECT_THAT(error([](ImageSpec& s) {
                s.blobs = {{BlobScope::kRank, "big", UINT64_MAX}};
              }),
              invalid("blob \"big\""));
  pieces_[0].end = 5;
  EXPECT_THAT(error([](ImageSpec&) {}), invalid("tensor \"t\""));
  pieces_[0].end = 4;
  tensor_states_[0].tensor = std::string("a\0b", 3);
  EXPECT_THAT(error([](ImageSpec&) {}), invalid("UTF-8"));
  tensor_states_[0] = {"t", "param", Dtype::kFloat32, {uint64_t{1} << 55}};
  pieces_[0].end = uint64_t{1} << 55;
  EXPECT_THAT(error([](ImageSpec&) {}), invalid("image: expected at most"));
}

TEST_F(ImageTest, AScratchDirectoryThatIsNotThereIsNamed) {
  EXPECT_THAT(ImageTemplate::Build(Spec(), directory_ + "/missing").status(),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr(directory_ + "/missing")));
}

double Milliseconds(const std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin)
      .count();
}

// Sizes of DESIGN's limits. Times are printed, not judged: bench/ measures them.
TEST_F(ImageTest, A100000TensorsFitIntoOneImage) {
  for (int i = 0; i < 100'000; ++i) {
    Add(absl::StrFormat("model.layers.%d.block.weight", i), "param", Dtype::kBfloat16, {17, 3});
  }
  const auto build_begin = std::chrono::steady_clock::now();
  ASSERT_OK_AND_ASSIGN(const ImageTemplate image, Build());
  const double build_ms = Milliseconds(build_begin);
  std::vector<std::byte> head(image.head_bytes());
  image.StampHead({kCheckpoint, {}}, 0, head);
  const auto stamp_begin = std::chrono::steady_clock::now();
  image.StampHead({kCheckpoint, {}}, 0, head);
  std::printf("100,000 datasets: built in %.0f ms, head of %.1f MB stamped in %.2f ms\n", build_ms,
              static_cast<double>(head.size()) / 1e6, Milliseconds(stamp_begin));
  EXPECT_EQ(image.piece_offsets().size(), 100'000u);
}

}  // namespace
}  // namespace holdfast
