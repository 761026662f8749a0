// Headers written here by hand, each with what the specification or the official library says of
// it; every header of ../shared is read by tests/fixtures_test.py.
#include "converter/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <string>

#include "absl/strings/str_cat.h"
#include "converter/hf.h"
#include "io/posix_file_system.h"
#include "tests/support/status_matchers.h"
#include "tests/support/temporary_directory.h"

namespace holdfast::converter {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

std::string Length(uint64_t value) {
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes += static_cast<char>(value >> (8 * i));
  return bytes;
}

std::string File(const std::string& header, size_t data_bytes) {
  return Length(header.size()) + header + std::string(data_bytes, '\1');
}

absl::StatusOr<SafetensorsHeader> Parse(const std::string& header, size_t data_bytes) {
  return ParseSafetensorsHeader(header, 8 + header.size() + data_bytes, "x.safetensors");
}

constexpr char kA[] = R"("a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]})";

TEST(Safetensors, ReadsWhatTheLibraryReads) {
  struct Case {
    std::string header;
    size_t data_bytes;
    std::vector<std::string> names;
  };
  const std::string a = kA;
  for (
      const Case& each : std::vector<Case>{
          {"{}", 0, {}},
          {"{" + a + "}", 24, {"a"}},
          {" \n{" + a + "} \t\n", 24, {"a"}},
          {R"({"b": {"dtype": "U8", "shape": [], "data_offsets": [24, 25]}, )" + a + "}",
           25,
           {"a", "b"}},
          {"{" + a + R"(, "e": {"dtype": "F64", "shape": [0, 9], "data_offsets": [24, 24]}})",
           24,
           {"a", "e"}},
          {R"({"": {"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1], "other": [{}]}})",
           1,
           {""}},
          {R"({"l": ["I16", [2], [0, 4]]})", 4, {"l"}},
          {R"({"__metadata__": null, )" + a + "}", 24, {"a"}},
          {R"({"h": {"dtype": "F32", "shape": [0, 9223372036854775808, 2], "data_offsets": [0, 0]}})",
           0,
           {"h"}},
          {R"({"f": {"dtype": "F4", "shape": [3, 4], "data_offsets": [0, 6]}})", 6, {"f"}},
      }) {
    ASSERT_OK_AND_ASSIGN(const SafetensorsHeader header, Parse(each.header, each.data_bytes));
    std::vector<std::string> names;
    for (const auto& tensor : header.tensors) names.push_back(tensor.name);
    EXPECT_EQ(names, each.names) << each.header;
  }
}

TEST(Safetensors, RefusesWhatTheSpecificationRefuses) {
  const auto tensor = [](const std::string& dtype, const std::string& shape,
                         const std::string& offsets) {
    return absl::StrCat(R"({"a": {"dtype": ")", dtype, R"(", "shape": )", shape,
                        R"(, "data_offsets": )", offsets, "}}");
  };
  const std::string a = kA;
  struct Case {
    std::string header;
    size_t data_bytes;
    std::string text;
  };
  for (const Case& each : std::vector<Case>{
           {"", 0, "header"},
           {"[]", 0, "an object"},
           {"{" + a + "}", 23, "24 bytes from offset 0"},
           {"{" + a + "}", 25, "expected 24 bytes of data"},
           {"{" + a + "}" + std::string(1, '\0'), 24, "header"},
           {"\xEF\xBB\xBF{" + a + "}", 24, "header"},
           {tensor("F32", "[3]", "[4, 16]"), 16, "expected it to begin at offset 0, where"},
           {"{" + a + R"(, "b": {"dtype": "U8", "shape": [4], "data_offsets": [20, 24]}})", 24,
            "offset 24"},
           {"{" + a + R"(, "b": {"dtype": "U8", "shape": [1], "data_offsets": [25, 26]}})", 26,
            "offset 24"},
           {tensor("F32", "[3]", "[12, 0]"), 12, "offsets [12, 0)"},
           {tensor("F32", "[3]", "[0, 16]"), 16, "expected 12 bytes"},
           {tensor("F128", "[1]", "[0, 16]"), 16, "F128"},
           {tensor("f32", "[1]", "[0, 4]"), 4, "f32"},
           {tensor("F32", "[3.0]", "[0, 12]"), 12, "integer"},
           {tensor("F32", "[1e1]", "[0, 40]"), 40, "integer"},
           {tensor("F32", "[-0]", "[0, 0]"), 0, "integer"},
           {tensor("F32", "[9223372036854775808, 2, 0]", "[0, 0]"), 0, "2^64"},
           {tensor("F4", "[3]", "[0, 2]"), 2, "inside a byte"},
           {tensor("F32", "3", "[0, 12]"), 12, "an array"},
           {tensor("F32", "[3]", "[0]"), 12, "two offsets"},
           {R"({"a": null})", 0, "an object"},
           {R"({"a": {"dtype": "F32", "shape": [0]}})", 0, "data_offsets"},
           {R"({"a": {"dtype": "F32", "dtype": "F32", "shape": [0], "data_offsets": [0, 0]}})", 0,
            "dtype twice"},
           {R"({"__metadata__": {}, "__metadata__": {}})", 0, "__metadata__ twice"},
           {R"({"__metadata__": {"k": 1}})", 0, "a string"},
           // The library reads this one: the last counts for it.
           {"{" + a + ", " + a + "}", 24, "the tensor \"a\" twice"},
           {"{" + a + R"(, "\u0061": {"dtype": "U8", "shape": [1], "data_offsets": [24, 25]}})", 25,
            "\"a\" twice"},
           {std::string(1000, '{'), 0, "header"},
       }) {
    EXPECT_THAT(Parse(each.header, each.data_bytes),
                StatusIs(absl::StatusCode::kDataLoss, HasSubstr(each.text)))
        << each.header;
  }
}

TEST(Safetensors, OfAMetadataKeyTheLastCounts) {
  ASSERT_OK_AND_ASSIGN(const SafetensorsHeader header,
                       Parse(R"({"__metadata__": {"k": "1", "x": "y", "k": "2"}})", 0));
  EXPECT_THAT(header.metadata, ElementsAre(std::pair("k", "2"), std::pair("x", "y")));
}

class FileTest : public testing::Test {
 protected:
  void Write(const std::string& name, const std::string& bytes) {
    std::ofstream(directory_.path() + "/" + name, std::ios::binary) << bytes;
  }
  absl::StatusOr<ForeignIndex> Read(const std::string& name) {
    auto folder = ForeignFolder::Open(*file_system_, directory_.path() + name);
    if (!folder.ok()) return folder.status();
    folder_ = *std::move(folder);
    const auto reader = RecognizeFormat(*folder_);
    if (!reader.ok()) return reader.status();
    if (*reader == nullptr) return absl::NotFoundError("none");
    return ReadFormat(**reader, *folder_, {});
  }

  const std::unique_ptr<FileSystem> file_system_ = NewPosixFileSystem();
  const TemporaryDirectory directory_;
  std::unique_ptr<ForeignFolder> folder_;
};

TEST_F(FileTest, LengthsThatLieAreRefused) {
  for (const std::string& bytes :
       {std::string(), std::string("1234567"), Length(1) + "", Length(100'000'001) + "{}",
        Length(~uint64_t{0}) + "{}", Length(~uint64_t{7}) + "{}", Length(3) + "{}"}) {
    Write("x.safetensors", bytes);
    EXPECT_THAT(Read("/x.safetensors"),
                StatusIs(absl::StatusCode::kDataLoss, HasSubstr("x.safetensors")));
  }
}

TEST_F(FileTest, IsRecognizedByItsFirstBytesToo) {
  Write("weights", File(absl::StrCat("{", kA, "}"), 24));
  EXPECT_THAT(Read("/weights"), IsOk());
  Write("text", "0123456789{ and so on, and on, and on, and on, and on");
  EXPECT_THAT(Read("/text"), StatusIs(absl::StatusCode::kNotFound));
}

TEST_F(FileTest, TiedWeightsOfSaveModelAreAliases) {
  Write("x.safetensors",
        File(absl::StrCat(R"({"__metadata__": {"format": "pt", "b": "a", "c": "zzz"}, )", kA, "}"),
             24));
  ASSERT_OK_AND_ASSIGN(const ForeignIndex index, Read("/x.safetensors"));
  ASSERT_EQ(index.tensor_states.size(), 2u);
  EXPECT_EQ(index.tensor_states[1].tensor, "b");
  EXPECT_EQ(index.tensor_states[1].shape, (std::vector<uint64_t>{2, 3}));
  EXPECT_THAT(index.aliases, ElementsAre(Alias{1, 0}));
  EXPECT_EQ(index.pieces.size(), 2u);
}

TEST_F(FileTest, ShardsAreReadByTheirIndex) {
  const auto shard = [&](const std::string& name, const std::string& tensor) {
    Write(name, File(absl::StrCat("{\"", tensor,
                                  R"(": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}})"),
                     4));
  };
  shard("model-1.safetensors", "a");
  shard("model-2.safetensors", "b");
  shard("stray.safetensors", "a");  // not in the index: no contradiction
  const auto write_index = [&](const std::string& b_file) {
    Write(
        "model.safetensors.index.json",
        absl::StrCat(
            R"({"metadata": {"total_size": 8}, "weight_map": {"a": "model-1.safetensors", "b": ")",
            b_file, "\"}}"));
  };
  write_index("model-2.safetensors");
  ASSERT_OK_AND_ASSIGN(ForeignIndex index, Read(""));
  EXPECT_EQ(index.format, "hf");
  EXPECT_EQ(index.tensor_states.size(), 2u);
  EXPECT_THAT(index.losses, testing::IsEmpty());
  EXPECT_THAT(index.notes, testing::IsEmpty());
  // A shard that is not there, and a tensor that is not in its shard.
  write_index("model-3.safetensors");
  ASSERT_OK_AND_ASSIGN(index, Read(""));
  EXPECT_THAT(index.losses, ElementsAre(HasSubstr("model-3.safetensors")));
  EXPECT_EQ(index.tensor_states.size(), 1u);
  write_index("model-1.safetensors");
  ASSERT_OK_AND_ASSIGN(index, Read(""));
  EXPECT_THAT(index.losses, ElementsAre(HasSubstr("the tensor \"b\"")));
  // Shards elsewhere.
  for (const char* name : {"../model-1.safetensors", "/etc/passwd"}) {
    write_index(name);
    EXPECT_THAT(Read(""), StatusIs(absl::StatusCode::kPermissionDenied, HasSubstr("leads out")));
  }
  std::filesystem::create_symlink("/etc/passwd", directory_.path() + "/model-4.safetensors");
  write_index("model-4.safetensors");
  EXPECT_THAT(Read(""), StatusIs(absl::StatusCode::kPermissionDenied, HasSubstr("symbolic link")));
}

TEST_F(FileTest, OneNameInTwoFilesNeedsAnIndex) {
  Write("config.json", R"({"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": true})");
  Write("model.safetensors", File(absl::StrCat("{", kA, "}"), 24));
  ASSERT_OK_AND_ASSIGN(const ForeignIndex index, Read(""));
  EXPECT_EQ(index.format, "hf");
  EXPECT_THAT(index.notes, ElementsAre(HasSubstr("lm_head.weight")));
  Write("model2.safetensors", File(absl::StrCat("{", kA, "}"), 24));
  EXPECT_THAT(Read(""), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("both have the tensor")));
}

TEST_F(FileTest, ShardsWithoutAnIndexNumberThemselves) {
  Write("config.json", "{}");
  const auto shard = [](const std::string& name) {
    return File(absl::StrCat(R"({")", name, R"(": {"dtype": "U8", "shape": [1], )",
                             R"("data_offsets": [0, 1]}})"),
                1);
  };
  Write("model-00001-of-00003.safetensors", shard("a"));
  Write("model-00003-of-00003.safetensors", shard("c"));
  Write("more-1-of-x.safetensors", shard("d"));
  ASSERT_OK_AND_ASSIGN(ForeignIndex index, Read(""));
  EXPECT_EQ(index.tensor_states.size(), 3u);
  EXPECT_THAT(index.losses,
              ElementsAre(HasSubstr("expected 3 files, as their names say, found 2")));
  Write("model-00002-of-00003.safetensors", shard("b"));
  ASSERT_OK_AND_ASSIGN(index, Read(""));
  EXPECT_THAT(index.losses, testing::IsEmpty());
}

// What a damaged or hostile child could send: every byte changed, every length cut.
TEST_F(FileTest, AnIndexThatIsNotOursIsRefusedOrValid) {
  Write("x.safetensors",
        File(absl::StrCat(R"({"__metadata__": {"format": "pt", "b": "a"}, )", kA, "}"), 24));
  ASSERT_OK_AND_ASSIGN(ForeignIndex index, Read("/x.safetensors"));
  index.boxes.Add(std::vector<uint64_t>{0, 1}, std::vector<uint64_t>{2, 1});
  index.strides.push_back({3, 1});
  index.opaque_classes.push_back({"os.system", 3});
  index.AddInline("0123");
  index.blobs.push_back({"rng", 1});
  ASSERT_THAT(Finish(index), IsOk());
  ASSERT_OK_AND_ASSIGN(const std::string bytes, EncodeForeignIndex(index));
  for (size_t cut = 0; cut < bytes.size(); ++cut) {
    EXPECT_FALSE(DecodeForeignIndex(std::as_bytes(std::span(bytes).first(cut))).ok());
  }
  for (size_t at = 0; at < bytes.size(); ++at) {
    std::string changed = bytes;
    changed[at] = static_cast<char>(changed[at] ^ 0x11);
    EXPECT_FALSE(DecodeForeignIndex(std::as_bytes(std::span(changed))).ok());  // its CRC32C
  }
}

}  // namespace
}  // namespace holdfast::converter
