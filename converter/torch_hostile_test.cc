// The 455 hostile pickles and zips that ../shared/fixtures/recipes/hostile_pickle.py makes: each
// has the outcome that is written beside it, with bounded memory. Nothing runs: there is nothing
// here that could, so what is looked at is that readers agree and stay small.
#include <sys/wait.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <regex>
#include <set>
#include <string>

#include "base/json_reader.h"
#include "converter/byte_source.h"
#include "converter/torch_file.h"
#include "converter/torch_index.h"
#include "gtest/gtest.h"
#include "tests/support/allocation_meter.h"
#include "tests/support/temporary_directory.h"

namespace holdfast::converter {
namespace {

const std::string kRecipe =
    std::string(HOLDFAST_TEST_SHARED) + "/fixtures/recipes/hostile_pickle.py";

std::string ReadWhole(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// The outcomes that the recipe's words allow: the first word, and each after an "or".
std::set<std::string> Allowed(const std::string& words) {
  std::set<std::string> allowed;
  const std::regex pattern("(^|\\bor )(refuse|inert|accept|bounded)");
  for (std::sregex_iterator i(words.begin(), words.end(), pattern), end; i != end; ++i) {
    allowed.insert((*i)[2]);
  }
  return allowed;
}

// [[0, 1], [2, 3]], as the file says that 'good' is.
bool IsGood(const TorchFile& file, const ByteSource& source, const TorchValue& value) {
  const auto tensor = value.Tensor();
  if (!tensor.ok() || (*tensor)->dtype != Dtype::kFloat32) return false;
  if ((*tensor)->shape != std::vector<uint64_t>{2, 2}) return false;
  const TorchStorage& storage = file.storages()[(*tensor)->storage];
  for (uint64_t i = 0; i < 4; ++i) {
    const uint64_t element =
        (*tensor)->offset + i / 2 * (*tensor)->strides[0] + i % 2 * (*tensor)->strides[1];
    uint32_t bits = 0;
    if (!source.ReadAt(storage.offset + 4 * element, std::as_writable_bytes(std::span(&bits, 1)))
             .ok()) {
      return false;
    }
    if (file.big_endian()) bits = __builtin_bswap32(bits);
    if (std::bit_cast<float>(bits) != static_cast<float>(i)) return false;
  }
  return true;
}

// Which of the recipe's outcomes reading this file has.
std::string OutcomeOf(const std::string& name, const std::string& bytes, std::string& error) {
  const MemorySource source(name, bytes);
  const auto file = TorchFile::Open(source);
  if (!file.ok()) {
    error = file.status().ToString();
    return "refuse";
  }
  const std::string shown = TorchJson((*file)->root(), 4096);
  EXPECT_LE(shown.size(), 64u << 10) << name;
  EXPECT_FALSE((*file)->OpaqueClasses().contains("")) << name;
  const TorchValue good = (*file)->root().Find("good");
  if (!good.present()) return "inert";
  return IsGood(**file, source, good) ? "accept" : "wrong";
}

// What the recipe's words say of two files that have another 'good', or none.
void CheckOdd(const std::string& name, const std::string& bytes) {
  const MemorySource source(name, bytes);
  const auto file = TorchFile::Open(source);
  ASSERT_TRUE(file.ok()) << name;
  if (name == "tensor/conj_bit.pt") {
    EXPECT_TRUE((*(*file)->root().Find("conj").Tensor())->conj);
  } else {  // little-endian numbers that are said to be big-endian
    EXPECT_TRUE((*file)->big_endian());
    EXPECT_FALSE(IsGood(**file, source, (*file)->root().Find("good")));
  }
}

TEST(TorchHostile, EveryFileHasItsDocumentedOutcome) {
  if (!std::filesystem::exists(kRecipe)) GTEST_SKIP() << "no " << kRecipe;
  const TemporaryDirectory directory;
  const std::string command = "python3 " + kRecipe + " " + directory.path() + " >/dev/null";
  ASSERT_EQ(std::system(command.c_str()), 0);
  const auto table = JsonDocument::Parse(ReadWhole(directory.Join("hostile.json")));
  ASSERT_TRUE(table.ok()) << table.status().ToString();
  const JsonValue rows = (*table)->root();
  std::map<std::string, int> counts;
  for (size_t i = 0; i < *rows.ArraySize(); ++i) {
    const std::string name(*rows[i].Get("file")->String());
    const std::string expected(*rows[i].Get("expected")->String());
    const std::string bytes = ReadWhole(directory.Join(name));
    std::string error;
    std::string outcome;
    {
      AllocationMeter meter(size_t{512} << 20);
      outcome = OutcomeOf(name, bytes, error);
      // The nodes of a pickle are larger than its opcodes.
      EXPECT_LE(meter.GrowthPeak(), (size_t{8} << 20) + 100 * bytes.size()) << name;
    }
    const std::set<std::string> allowed = Allowed(expected);
    ASSERT_FALSE(allowed.empty()) << expected;
    // An "inert" file that is read is read right; "bounded" is about memory and time alone.
    bool fits = allowed.contains("bounded") || allowed.contains(outcome) ||
                (outcome == "accept" && allowed.contains("inert"));
    if (name == "tensor/conj_bit.pt" || name == "zip/byteorder_big.pt") {
      CheckOdd(name, bytes);
      fits = true;
    }
    // Its words say inert; but its SETITEMS has three values, which Python and torch refuse too.
    if (name == "bomb/self_tuple.pt") fits = outcome == "refuse";
    EXPECT_TRUE(fits) << name << ": expected " << expected << ", found " << outcome << " " << error;
    ++counts[outcome];
  }
  EXPECT_EQ(*rows.ArraySize(), 455u);
  printf("%d refused, %d accepted, %d inert\n", counts["refuse"], counts["accept"],
         counts["inert"]);
  // A reader that refuses everything would pass above.
  EXPECT_GE(counts["accept"], 60);
}

}  // namespace
}  // namespace holdfast::converter
