// The directory reader against archives built field by field: what is read, and every way in which
// an archive could be read in two ways is refused. What torch writes is in torch_fixtures_test.cc,
// 455 more hostile files in torch_hostile_test.cc.
#include "converter/zip_reader.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "base/zip_crc32.h"
#include "converter/test_zip.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace holdfast::converter {
namespace {

using ::testing::HasSubstr;

absl::StatusOr<ZipDirectory> ReadBytes(const std::string& bytes) {
  return ZipDirectory::Read(MemorySource("x.zip", bytes));
}

std::string ErrorOf(const std::string& bytes) {
  const auto directory = ReadBytes(bytes);
  return directory.ok() ? "" : directory.status().ToString();
}

TestZip Two() {
  TestZip zip;
  zip.entries = {{.name = "a/data.pkl", .data = "first"}, {.name = "a/data/0", .data = "second!"}};
  return zip;
}

TEST(ZipReader, FindsTheBytesOfEveryEntry) {
  for (const bool zip64 : {false, true}) {
    for (const std::string before : {"", "twenty bytes of junk"}) {
      TestZip zip = Two();
      zip.zip64_end = zip64;
      zip.comment = zip64 ? "" : "a comment";
      const std::string bytes = before + zip.Bytes();
      const auto directory = ReadBytes(bytes);
      ASSERT_TRUE(directory.ok()) << directory.status().ToString();
      EXPECT_EQ(directory->begin(), before.size());
      ASSERT_EQ(directory->entries().size(), 2u);
      for (size_t i = 0; i < 2; ++i) {
        const ZipEntry& entry = directory->entries()[i];
        EXPECT_EQ(entry.name, zip.entries[i].name);
        EXPECT_EQ(bytes.substr(entry.data_offset, entry.bytes), zip.entries[i].data);
        EXPECT_EQ(directory->Find(entry.name), &entry);
        EXPECT_TRUE(CheckZipCrc32(MemorySource("x", bytes), entry).ok());
      }
      EXPECT_EQ(directory->Find("a/data/1"), nullptr);
    }
  }
  EXPECT_TRUE(ReadBytes(TestZip().Bytes())->entries().empty());
}

TEST(ZipReader, MovesAndKeepsItsNames) {
  ZipDirectory moved = *ReadBytes(Two().Bytes());
  ZipDirectory again = std::move(moved);
  EXPECT_NE(again.Find("a/data/0"), nullptr);
}

TEST(ZipReader, SizesMayStandInAZip64Field) {
  TestZip zip = Two();
  zip.entries[1].zip64_sizes = true;
  const auto directory = ReadBytes(zip.Bytes());
  ASSERT_TRUE(directory.ok()) << directory.status().ToString();
  EXPECT_EQ(directory->entries()[1].bytes, 7u);
}

// Sums of these with an offset would begin again at 0.
TEST(ZipReader, Zip64NumbersThatOverflowAreRefused) {
  TestZip zip = Two();
  zip.entries[1].zip64_sizes = true;
  std::string bytes = zip.Bytes();
  // The end record says that its numbers stand in its ZIP64 form: counts, size, offset.
  std::fill_n(bytes.end() - 14, 12, '\xff');
  ASSERT_EQ(ErrorOf(bytes), "");
  const size_t field = bytes.find(std::string("\x01\0\x10\0", 4));
  const size_t end = bytes.find("PK\x06\x06");
  const size_t locator = bytes.find("PK\x06\x07");
  ASSERT_TRUE(field != std::string::npos && end != std::string::npos);
  ASSERT_NE(locator, std::string::npos);
  // An entry's size, stored and not; the numbers of entries; the directory's size and offset; the
  // offset of the ZIP64 end record.
  const std::vector<std::vector<size_t>> places = {
      {field + 4}, {field + 12}, {field + 4, field + 12}, {end + 24, end + 32},
      {end + 40},  {end + 48},   {end + 40, end + 48},    {locator + 8}};
  for (const uint64_t value : {~uint64_t{0}, ~uint64_t{0} - 7, ~uint64_t{0} - bytes.size(),
                               uint64_t{1} << 63, (uint64_t{1} << 63) - 1, uint64_t{1} << 32}) {
    for (const std::vector<size_t>& changed : places) {
      std::string lying = bytes;
      for (const size_t place : changed) std::memcpy(&lying[place], &value, sizeof(value));
      EXPECT_NE(ErrorOf(lying), "") << changed[0] << " " << value;
    }
  }
}

TEST(ZipReader, WhatCouldBeReadInTwoWaysIsRefused) {
  const auto broken = [](auto change) {
    TestZip zip = Two();
    change(zip);
    return ErrorOf(zip.Bytes());
  };
  EXPECT_THAT(broken([](TestZip& z) { z.entries[1].name = "a/data.pkl"; }),
              HasSubstr("duplicate name"));
  EXPECT_THAT(broken([](TestZip& z) { z.entries[1].offset = 0; }), HasSubstr("overlaps"));
  EXPECT_THAT(broken([](TestZip& z) {
                z.entries[0].central_size = 60;
                z.entries[0].flags = 8;
              }),
              HasSubstr("overlaps"));
  EXPECT_THAT(broken([](TestZip& z) { z.entries[0].central_size = 1 << 20; }),
              HasSubstr("before the directory"));
  EXPECT_THAT(broken([](TestZip& z) { z.entries[0].local_name = "b/data.pkl"; }),
              HasSubstr("disagree"));
  EXPECT_THAT(broken([](TestZip& z) { z.entries[0].local_method = 8; }), HasSubstr("disagree"));
  EXPECT_THAT(broken([](TestZip& z) { z.entries[0].local_size = 9; }), HasSubstr("disagree"));
  EXPECT_THAT(broken([](TestZip& z) { z.entries[0].offset = 1 << 20; }), HasSubstr("expected"));
  EXPECT_THAT(broken([](TestZip& z) { z.entries[0].offset = 1; }), HasSubstr("local header"));
  EXPECT_THAT(broken([](TestZip& z) { z.entries[0].method = 99; }), HasSubstr("UNIMPLEMENTED"));
  EXPECT_THAT(broken([](TestZip& z) { z.entries[0].flags = 1; }), HasSubstr("encrypted"));
  EXPECT_THAT(broken([](TestZip& z) { z.count = 3; }), HasSubstr("central directory"));
  EXPECT_THAT(broken([](TestZip& z) { z.count = 1; }), HasSubstr("bytes more"));
  for (const std::string name : {"", "/etc/passwd", "a/../b", "..", "a\\b", "a\xff"}) {
    EXPECT_THAT(broken([&](TestZip& z) { z.entries[0].name = name; }), HasSubstr("its name"))
        << name;
  }
  EXPECT_THAT(broken([&](TestZip& z) { z.entries[0].name = std::string("a\0b", 3); }),
              HasSubstr("NUL"));
  EXPECT_THAT(ErrorOf(Two().Bytes() + "x"), HasSubstr("no end record"));
  EXPECT_EQ(ErrorOf(Two().Bytes()), "");
}

// Whatever is cut or changed: an error or an archive whose entries can be read, never more.
TEST(ZipReader, EveryCutAndEveryChangedByteIsSafe) {
  const std::string bytes = Two().Bytes();
  size_t refused = 0;
  for (size_t i = 0; i < bytes.size(); ++i) {
    EXPECT_FALSE(ReadBytes(bytes.substr(0, i)).ok()) << i;
    for (const char value : {'\0', '\x01', '\x7f', '\xff'}) {
      std::string changed = bytes;
      changed[i] = value;
      const MemorySource source("x", changed);
      const auto directory = ZipDirectory::Read(source);
      if (!directory.ok()) {
        ++refused;
        continue;
      }
      for (const ZipEntry& entry : directory->entries()) {
        const auto content = ReadZipEntry(source, entry, 1000, ZipCheck::kNone);
        EXPECT_TRUE(content.ok() || entry.method == ZipEntry::Method::kDeflated);
      }
    }
  }
  EXPECT_GT(refused, bytes.size());
}

TEST(ZipReader, ContentIsCheckedAndBounded) {
  TestZip zip = Two();
  zip.entries[0].crc32 = 7;
  const MemorySource source("x.zip", zip.Bytes());
  const ZipDirectory directory = *ZipDirectory::Read(source);
  const ZipEntry& entry = directory.entries()[0];
  EXPECT_EQ(*ReadZipEntry(source, entry, 5, ZipCheck::kNone), "first");
  EXPECT_THAT(ReadZipEntry(source, entry, 5, ZipCheck::kCrc32).status().ToString(),
              HasSubstr("00000007"));
  EXPECT_FALSE(ReadZipEntry(source, entry, 5, ZipCheck::kCrc32UnlessZero).ok());
  EXPECT_EQ(CheckZipCrc32(source, entry).code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(ReadZipEntry(source, entry, 4, ZipCheck::kNone).status().code(),
            absl::StatusCode::kResourceExhausted);
  TestZip unchecked = Two();
  unchecked.entries[0].crc32 = 0;
  const MemorySource other("x.zip", unchecked.Bytes());
  const ZipDirectory zero = *ZipDirectory::Read(other);
  EXPECT_TRUE(ReadZipEntry(other, zero.entries()[0], 5, ZipCheck::kCrc32UnlessZero).ok());
  EXPECT_FALSE(ReadZipEntry(other, zero.entries()[0], 5, ZipCheck::kCrc32).ok());
}

TEST(ZipReader, DeflatedEntriesAreInflatedToWhatTheDirectorySays) {
  // "a" a hundred times: zlib.compressobj(9, zlib.DEFLATED, -15)
  const std::string deflated("\x4b\x4c\xa4\x3d\x00\x00", 6);
  for (const uint32_t said : {100u, 99u, 101u}) {
    TestZip zip;
    zip.entries = {{.name = "a", .data = deflated, .method = 8, .inflated_size = said}};
    const std::string inflated(100, 'a');
    zip.entries[0].crc32 = ExtendZipCrc32(0, std::as_bytes(std::span(inflated)));
    const MemorySource source("x", zip.Bytes());
    const ZipDirectory directory = *ZipDirectory::Read(source);
    const auto content = ReadZipEntry(source, directory.entries()[0], 1000, ZipCheck::kCrc32);
    EXPECT_EQ(content.ok(), said == 100) << content.status().ToString();
    EXPECT_TRUE(!content.ok() || *content == inflated);
  }
}

}  // namespace
}  // namespace holdfast::converter
