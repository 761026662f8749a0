// Zip archives for tests, of which every field can be made to lie.
#ifndef HOLDFAST_CONVERTER_TEST_ZIP_H_
#define HOLDFAST_CONVERTER_TEST_ZIP_H_

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/zip_crc32.h"

namespace holdfast::converter {

struct TestZipEntry {
  std::string name;
  std::string data;  // as it is stored
  uint16_t method = 0;
  uint16_t flags = 0x800;
  bool zip64_sizes = false;
  // What is said if it is not the truth.
  std::optional<std::string> local_name = {};
  std::optional<uint16_t> local_method = {};
  std::optional<uint32_t> local_size = {};
  std::optional<uint32_t> central_size = {};
  std::optional<uint32_t> inflated_size = {};
  std::optional<uint32_t> crc32 = {};
  std::optional<uint32_t> offset = {};
};

struct TestZip {
  std::vector<TestZipEntry> entries;
  bool zip64_end = true;
  std::string comment;
  std::optional<uint16_t> count;

  std::string Bytes() const {
    std::string out;
    std::string central;
    for (const TestZipEntry& entry : entries) {
      const uint32_t begin = static_cast<uint32_t>(out.size());
      const uint32_t size = static_cast<uint32_t>(entry.data.size());
      const uint32_t crc32 =
          entry.crc32.value_or(ExtendZipCrc32(0, std::as_bytes(std::span(entry.data))));
      const std::string& local_name = entry.local_name ? *entry.local_name : entry.name;
      const bool later = (entry.flags & 8) != 0;
      Add(out, {{0x04034b50, 4},
                {20, 2},
                {entry.flags, 2},
                {entry.local_method.value_or(entry.method), 2},
                {0, 4},
                {later ? 0 : crc32, 4},
                {later ? 0 : entry.local_size.value_or(size), 4},
                {later ? 0 : entry.local_size.value_or(entry.inflated_size.value_or(size)), 4},
                {local_name.size(), 2},
                {0, 2}});
      out += local_name + entry.data;
      const uint32_t said = entry.central_size.value_or(size);
      const uint32_t inflated = entry.inflated_size.value_or(said);
      std::string extra;
      if (entry.zip64_sizes) Add(extra, {{1, 2}, {16, 2}, {inflated, 8}, {said, 8}});
      const uint32_t none = 0xFFFFFFFF;
      Add(central, {{0x02014b50, 4},
                    {0, 4},
                    {entry.flags, 2},
                    {entry.method, 2},
                    {0, 4},
                    {crc32, 4},
                    {entry.zip64_sizes ? none : said, 4},
                    {entry.zip64_sizes ? none : inflated, 4},
                    {entry.name.size(), 2},
                    {extra.size(), 2},
                    {0, 2},
                    {0, 2},
                    {0, 6},
                    {entry.offset.value_or(begin), 4}});
      central += entry.name + extra;
    }
    const uint64_t at = out.size();
    const uint64_t said_count = count.value_or(static_cast<uint16_t>(entries.size()));
    out += central;
    if (zip64_end) {
      const uint64_t end = out.size();
      Add(out, {{0x06064b50, 4},
                {44, 8},
                {0, 4},
                {0, 4},
                {0, 4},
                {said_count, 8},
                {said_count, 8},
                {central.size(), 8},
                {at, 8}});
      Add(out, {{0x07064b50, 4}, {0, 4}, {end, 8}, {1, 4}});
    }
    Add(out, {{0x06054b50, 4},
              {0, 2},
              {0, 2},
              {said_count, 2},
              {said_count, 2},
              {central.size(), 4},
              {at, 4},
              {comment.size(), 2}});
    return out + comment;
  }

 private:
  struct Field {
    uint64_t value;
    int bytes;
  };
  static void Add(std::string& out, std::initializer_list<Field> fields) {
    for (const Field& field : fields) {
      for (int i = 0; i < field.bytes; ++i) {
        out += static_cast<char>(i < 8 ? field.value >> (8 * i) : 0);
      }
    }
  }
};

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_TEST_ZIP_H_
