// docs/FORMAT.md ends in a worked example, and has test vectors. They are made again here, from the
// public API, and compared, so that the page cannot rot. HOLDFAST_UPDATE_DOCS=1 writes it into the
// page instead.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/crc32c.h"
#include "format/fingerprint.h"
#include "format/hdf5_template.h"
#include "format/image.h"
#include "format/index.h"
#include "format/manifest.h"
#include "tests/support/status_matchers.h"

namespace holdfast {
namespace {

constexpr char kPage[] = HOLDFAST_SOURCE_DIR "/docs/FORMAT.md";
constexpr char kUuid[] = "01234567-89ab-4cde-8f01-23456789abcd";
constexpr CheckpointId kCheckpoint{Attempt{2}, Step{7}};
constexpr uint64_t kBlockBytes = 4096;
constexpr char kLayout[] =
    "{\"holdfast_layout\": 1, \"mesh\": [], \"tensors\": [\n"
    " {\"name\": \"w\", \"shape\": [2, 3], \"states\": [{\"state\": \"param\", \"dtype\": "
    "\"float32\"}]}]}\n";

// `offset  16 bytes in hexadecimal  |text|`, as hexdump -C prints it.
std::string HexDump(std::span<const std::byte> bytes, uint64_t first_offset = 0) {
  std::string dump;
  for (size_t at = 0; at < bytes.size(); at += 16) {
    const auto line = bytes.subspan(at, std::min<size_t>(16, bytes.size() - at));
    std::string hex;
    std::string text;
    for (size_t i = 0; i < 16; ++i) {
      if (i == 8) hex += " ";
      if (i >= line.size()) {
        hex += "   ";
        continue;
      }
      const auto byte = std::to_integer<uint8_t>(line[i]);
      absl::StrAppendFormat(&hex, " %02x", byte);
      text.push_back(byte >= 0x20 && byte < 0x7f ? static_cast<char>(byte) : '.');
    }
    absl::StrAppendFormat(&dump, "%08x %s  |%s|\n", first_offset + at, hex, text);
  }
  return dump;
}

struct Example {
  std::vector<std::byte> image;
  std::string image_text;  // what the page says of it
  Index index;
};

// Offset of the 8 bytes in which two stamped heads differ.
size_t CellAt(const ImageTemplate& image, const ImageStamp& a, const ImageStamp& b) {
  std::vector<std::byte> heads[2];
  const ImageStamp* stamps[] = {&a, &b};
  for (int i = 0; i < 2; ++i) {
    heads[i].resize(image.head_bytes());
    image.StampHead(*stamps[i], 0, heads[i]);
  }
  const auto [at, other] = std::mismatch(heads[0].begin(), heads[0].end(), heads[1].begin());
  return static_cast<size_t>(at - heads[0].begin());
}

absl::StatusOr<Example> MakeExample(const std::string& scratch) {
  const std::vector<TensorState> tensor_states = {{"w", "param", Dtype::kFloat32, {2, 3}}};
  const std::vector<Piece> pieces = {{0, kWholeTensor, 0, 6}};
  const BoxTable boxes;
  ImageSpec spec;
  spec.job = "example";
  spec.job_uuid = kUuid;
  spec.world_size = 1;
  spec.block_bytes = kBlockBytes;
  spec.layout_json = kLayout;
  spec.tensor_states = tensor_states;
  spec.pieces = pieces;
  spec.boxes = &boxes;
  spec.blobs = {{BlobScope::kGlobal, "args", 16}};
  absl::StatusOr<ImageTemplate> image = ImageTemplate::Build(spec, scratch);
  if (!image.ok()) return image.status();

  Example example;
  const std::string blob = "--lr 1";
  const uint64_t blob_bytes[] = {blob.size()};
  example.image.resize(image->image_bytes());
  image->StampHead({kCheckpoint, blob_bytes}, 0,
                   std::span(example.image).first(image->head_bytes()));
  const uint64_t piece_at = image->piece_offsets()[0];
  const uint64_t blob_at = image->blob_offsets()[0];
  for (size_t i = 0; i < 6; ++i) {
    const auto number = static_cast<float>(i);
    std::memcpy(example.image.data() + piece_at + 4 * i, &number, 4);
  }
  std::memcpy(example.image.data() + blob_at, blob.data(), blob.size());

  const uint64_t blob_bytes_16[] = {16};  // differs in the first byte, as the ones below
  const uint64_t blob_bytes_5[] = {5};
  const size_t attempt_cell =
      CellAt(*image, {{Attempt{1}, Step{0}}, blob_bytes_5}, {{Attempt{2}, Step{0}}, blob_bytes_5});
  const size_t step_cell =
      CellAt(*image, {{Attempt{1}, Step{0}}, blob_bytes_5}, {{Attempt{1}, Step{1}}, blob_bytes_5});
  const size_t blob_cell =
      CellAt(*image, {{Attempt{1}, Step{0}}, blob_bytes_5}, {{Attempt{1}, Step{0}}, blob_bytes_16});
  example.image_text = absl::StrFormat(
      "head             %5d bytes\n"
      "cell attempt     %5d\n"
      "cell step        %5d\n"
      "cell bytes       %5d of /blobs/global/args\n"
      "payload          %5d /tensors/param/w\n"
      "payload          %5d /blobs/global/args\n"
      "image            %5d bytes\n\n%s*\n%s*\n%s",
      image->head_bytes(), attempt_cell, step_cell, blob_cell, piece_at, blob_at,
      image->image_bytes(), HexDump(std::span(example.image).first(128)),
      HexDump(std::span(example.image).subspan(step_cell / 16 * 16, 32), step_cell / 16 * 16),
      HexDump(std::span(example.image).subspan(piece_at, blob_at + 16 - piece_at), piece_at));

  Index& index = example.index;
  index.job = "example";
  index.job_uuid = kUuid;
  index.checkpoint = kCheckpoint;
  index.world_size = 1;
  index.layouts = {kLayout};
  index.images = {{ImageFileName(Rank{0}), Rank{0}, 0, example.image.size(), kBlockBytes, {}}};
  for (size_t at = 0; at < example.image.size(); at += kBlockBytes) {
    index.images[0].block_crc32c.push_back(
        Crc32c(std::span(example.image).subspan(at, kBlockBytes)));
  }
  index.tensor_states = tensor_states;
  index.facts.resize(1);
  index.facts[0].fingerprint =
      FingerprintOfShape(tensor_states[0]) +
      Fingerprinter().OfRun(tensor_states[0], 0, std::span(example.image).subspan(piece_at, 24));
  index.pieces = {{pieces[0], 0, piece_at}};
  index.blobs = {{BlobScope::kGlobal, Rank{0}, "args", 0, blob_at, blob.size()}};
  return example;
}

std::string ReadPage() {
  std::ifstream file(kPage, std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(file), {});
}

// Replaces the contents of the block that begins with "```example NAME"; false if there is none.
bool ReplaceBlock(std::string& page, const std::string& name, const std::string& contents) {
  const std::string begin = absl::StrCat("```example ", name, "\n");
  const size_t from = page.find(begin);
  if (from == std::string::npos) return false;
  const size_t to = page.find("```\n", from + begin.size());
  if (to == std::string::npos) return false;
  page.replace(from + begin.size(), to - from - begin.size(), contents);
  return true;
}

// That the page has these examples; or writes them there.
void ExpectOnPage(const std::map<std::string, std::string>& blocks) {
  const std::string page = ReadPage();
  std::string made = page;
  for (const auto& [name, contents] : blocks) {
    EXPECT_TRUE(ReplaceBlock(made, name, contents)) << "docs/FORMAT.md has no example " << name;
  }
  if (std::getenv("HOLDFAST_UPDATE_DOCS") != nullptr) {
    std::ofstream(kPage, std::ios::binary) << made;
  } else {
    EXPECT_EQ(page, made) << "HOLDFAST_UPDATE_DOCS=1 writes the example into docs/FORMAT.md";
  }
}

TEST(FormatDocTest, TheWorkedExampleIsWhatTheCodeWrites) {
  if (Hdf5LibraryVersion() != "1.10.8") {
    GTEST_SKIP() << "the page shows what libhdf5 1.10.8 lays out, found " << Hdf5LibraryVersion();
  }
  const std::string scratch = absl::StrCat(testing::TempDir(), "/format_doc_test.", getpid());
  std::filesystem::create_directories(scratch);
  const absl::StatusOr<Example> example = MakeExample(scratch);
  std::filesystem::remove_all(scratch);
  ASSERT_OK(example.status());
  ASSERT_OK_AND_ASSIGN(const std::vector<std::byte> index_bytes, EncodeIndex(example->index));

  const absl::Time time = absl::FromUnixSeconds(1'800'000'000);
  const std::string writer(WriterVersion());
  Manifest manifest;
  manifest.job = "example";
  manifest.job_uuid = kUuid;
  manifest.checkpoint = kCheckpoint;
  manifest.parent = CheckpointId{Attempt{1}, Step{5}};
  manifest.world_size = 1;
  manifest.survives = {.process = true, .power = true, .nodes = 0};
  manifest.index_bytes = index_bytes.size();
  manifest.index_crc32c = Crc32c(index_bytes);
  const IndexImage& image = example->index.images[0];
  manifest.images = {{image.file, image.bytes, ChecksumRoot(image.block_crc32c)}};
  manifest.created_by = writer;
  manifest.created_at = time;
  ASSERT_OK(CheckConsistent(manifest, example->index));

  const std::map<std::string, std::string> blocks = {
      {"layout", kLayout},
      {"image", example->image_text},
      {"INDEX", HexDump(index_bytes)},
      {"MANIFEST.json", EncodeManifest(manifest)},
      {"JOB.json", EncodeJobRecord({"example", kUuid, writer, time})},
      {"HEAD.1", EncodeHead({1, kUuid, kCheckpoint, Attempt{3}, "the loss went up", writer, time})},
      {"BAD.1", EncodeBadMark({1, kUuid, kCheckpoint, "NaN in \"w\"", writer, time})},
  };
  ExpectOnPage(blocks);
}

struct Vector {
  Dtype dtype;
  std::vector<uint64_t> shape;
  const char* contents;  // as the page explains them
};

Fingerprint FingerprintOf(const Vector& vector) {
  const TensorState state{"t", "param", vector.dtype, vector.shape};
  const std::string_view contents = vector.contents;
  uint64_t first_byte = 0;
  std::vector<std::byte> bytes;  // zeros have no term
  if (contents == "counting") {
    for (uint64_t n = 0; n < state.Bytes(); ++n) {
      bytes.push_back(static_cast<std::byte>(151 * n + n / 256));
    }
  } else if (contents == "last") {
    first_byte = state.Bytes() - ElementBytes(state.dtype);
    bytes = {std::byte{1}};
  }
  return FingerprintOfShape(state) + Fingerprinter().OfRun(state, first_byte, bytes);
}

TEST(FormatDocTest, TheTestVectorsAreWhatTheCodeComputes) {
  const uint64_t many = (uint64_t{1} << 33) + 1;
  const Vector vectors[] = {
      {Dtype::kFloat32, {}, "zeros"},
      {Dtype::kFloat32, {0}, "zeros"},
      {Dtype::kFloat32, {2, 3}, "zeros"},
      {Dtype::kFloat32, {3, 2}, "zeros"},
      {Dtype::kInt32, {2, 3}, "zeros"},
      {Dtype::kFloat32, {}, "counting"},
      {Dtype::kFloat32, {2, 3}, "counting"},
      {Dtype::kInt32, {2, 3}, "counting"},
      {Dtype::kInt8, {7}, "counting"},
      {Dtype::kBfloat16, {5}, "counting"},
      {Dtype::kInt64, {3}, "counting"},
      {Dtype::kFloat8E4m3fn, {4097}, "counting"},
      {Dtype::kBfloat16, {3, 1000}, "counting"},
      {Dtype::kFloat32, {3, 1000}, "counting"},
      {Dtype::kFloat64, {50, 100}, "counting"},
      {Dtype::kBool, {many}, "last"},
      {Dtype::kBfloat16, {many}, "last"},
      {Dtype::kFloat32, {3, many}, "last"},
      {Dtype::kFloat64, {uint64_t{1} << 20, uint64_t{1} << 30}, "last"},
  };
  std::string text;
  for (const Vector& vector : vectors) {
    absl::StrAppendFormat(&text, "%-13s  %-21s  %-8s  %s\n", DtypeName(vector.dtype),
                          absl::StrCat("[", absl::StrJoin(vector.shape, ", "), "]"),
                          vector.contents, FingerprintOf(vector).Hex());
  }
  ExpectOnPage({{"fingerprints", text}});
}

}  // namespace
}  // namespace holdfast
