// Every entry of an archive whose bytes are others than its CRC32 says is named, wherever the
// archive lies, and nothing else is.
#include "converter/archive_check.h"

#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>

#include "converter/format_reader.h"
#include "converter/test_zip.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "io/posix_file_system.h"
#include "tests/support/status_matchers.h"
#include "tests/support/temporary_directory.h"

namespace holdfast::converter {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

class ArchiveCheck : public ::testing::Test {
 protected:
  void Write(const std::string& name, const std::string& bytes) {
    std::ofstream(directory_.Join(name), std::ios::binary) << bytes;
  }
  static std::string Zip(uint32_t crc32, uint16_t method = 0) {
    TestZip zip;
    zip.entries = {{.name = "a/data.pkl", .data = "first"},
                   {.name = "a/data/0", .data = "second!", .method = method, .crc32 = crc32}};
    return zip.Bytes();
  }
  void Open() {
    auto folder = ForeignFolder::Open(*file_system_, directory_.path());
    ASSERT_THAT(folder, IsOk());
    folder_ = *std::move(folder);
  }
  // An index that takes bytes from this file.
  void Use(const std::string& name) {
    index_.AddRaw(*folder_->Find(name), 0, folder_->files()[*folder_->Find(name)].bytes);
  }

  const std::unique_ptr<FileSystem> file_system_ = NewPosixFileSystem();
  const TemporaryDirectory directory_;
  std::unique_ptr<ForeignFolder> folder_;
  ForeignIndex index_;
};

TEST_F(ArchiveCheck, NamesEntriesWithOtherBytes) {
  Write("bad.pt", Zip(7));
  Write("deflated.pt", Zip(7, 8));
  Write("not_computed.pt", Zip(0));
  Write("text.pt", "no archive at all");
  Write("unused.pt", Zip(9));
  Open();
  for (const char* name : {"deflated.pt", "not_computed.pt", "text.pt"}) Use(name);
  EXPECT_THAT(DamagedEntries(*folder_, index_), IsOkAndHolds(IsEmpty()));
  Use("bad.pt");
  EXPECT_THAT(DamagedEntries(*folder_, index_),
              IsOkAndHolds(ElementsAre(AllOf(HasSubstr("bad.pt: zip: entry \"a/data/0\""),
                                             HasSubstr("expected CRC32 00000007")))));
  ProofReport report;
  ASSERT_THAT(ProveArchives(*folder_, index_, report), IsOk());
  EXPECT_EQ(report.soundness, Soundness::kLost);
  EXPECT_EQ(report.finding_count, 1u);
  ASSERT_EQ(report.findings.size(), 1u);
  EXPECT_EQ(report.findings[0].kind, ProofFinding::Kind::kChecksum);
  EXPECT_THAT(report.findings[0].text, HasSubstr("bad.pt"));
}

TEST_F(ArchiveCheck, LooksAtEveryItemOfDcpFiles) {
  fs::copy(fs::path(HOLDFAST_SOURCE_DIR) / "tests/data/sharded/dcp_strided/ckpt",
           directory_.path());
  // As the hub's client calls its notes: not read, and so not too large.
  const std::string note = directory_.Join("model.safetensors.metadata");
  std::ofstream{note};
  fs::resize_file(note, uintmax_t{5} << 30);
  const auto read = [&] {
    Open();
    const auto reader = RecognizeFormat(*folder_);
    ASSERT_THAT(reader, IsOk());
    ASSERT_NE(*reader, nullptr);
    ASSERT_OK_AND_ASSIGN(index_, ReadFormat(**reader, *folder_, {}));
  };
  read();
  EXPECT_THAT(DamagedEntries(*folder_, index_), IsOkAndHolds(IsEmpty()));
  size_t changed = 0;
  for (size_t i = 0; i < index_.pieces.size(); i += 7) {
    const Extent extent = index_.extents[index_.pieces[i].extent];
    if (extent.file == kInline || extent.stored_bytes == 0) continue;
    const std::string path = directory_.Join(folder_->files()[extent.file].path);
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    const auto at = static_cast<std::streamoff>(extent.offset_bytes);
    char byte = 0;
    file.seekg(at).get(byte);
    const auto put = [&](char value) { file.seekp(at).put(value).flush(); };
    put(static_cast<char>(byte ^ 1));
    EXPECT_THAT(DamagedEntries(*folder_, index_),
                IsOkAndHolds(ElementsAre(HasSubstr(folder_->files()[extent.file].path))))
        << i;
    put(byte);
    ++changed;
  }
  EXPECT_GE(changed, 5u);
}

}  // namespace
}  // namespace holdfast::converter
