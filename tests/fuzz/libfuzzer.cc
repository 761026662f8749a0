// The libFuzzer program: `fuzzer --target=NAME [libFuzzer's own flags] CORPUS...`; its mutations
// are sealed, so that they get behind checksums. `fuzzer --target=NAME --write-seeds=DIRECTORY`
// writes the seeds to begin with, and ends.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "tests/fuzz/mutator.h"
#include "tests/fuzz/targets.h"

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t size_max);

namespace {

using holdfast::fuzz::Form;
using holdfast::fuzz::Target;

const Target* g_target = nullptr;

void WriteSeeds(const std::string& directory) {
  const auto write = [&directory](const std::string& name, const std::string& bytes) {
    std::ofstream file(absl::StrCat(directory, "/", name), std::ios::binary);
    file << bytes;
    CHECK(file.good());
  };
  size_t number = 0;
  for (const std::string& seed : holdfast::fuzz::SeedsOf(*g_target)) {
    write(absl::StrCat("seed-", number++), seed);
  }
  for (const auto& input : holdfast::fuzz::CorpusOf(*g_target)) write(input.name, input.bytes);
}

}  // namespace

// libFuzzer passes over flags that begin with two dashes.
extern "C" int LLVMFuzzerInitialize(int* argc, char*** argv) {
  std::string seeds_directory;
  for (int i = 1; i < *argc; ++i) {
    const std::string_view flag = (*argv)[i];
    constexpr std::string_view kTarget = "--target=";
    constexpr std::string_view kWriteSeeds = "--write-seeds=";
    if (flag.starts_with(kTarget)) {
      g_target = holdfast::fuzz::FindTarget(flag.substr(kTarget.size()));
    } else if (flag == "--list") {
      for (const Target& target : holdfast::fuzz::Targets()) {
        std::printf("%s\n", std::string(target.name).c_str());
      }
      std::exit(0);
    } else if (flag.starts_with(kWriteSeeds)) {
      seeds_directory = flag.substr(kWriteSeeds.size());
    }
  }
  if (g_target == nullptr) {
    std::fprintf(stderr, "expected --target=NAME, one of those that --list lists\n");
    std::exit(2);
  }
  if (!seeds_directory.empty()) {
    WriteSeeds(seeds_directory);
    std::exit(0);
  }
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  g_target->run({data, size});
  return 0;
}

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t size_max,
                                          unsigned int random_seed) {
  std::string input;
  if (random_seed % 4 == 0 && size > 0) {
    const std::vector<std::string> seeds = {std::string(reinterpret_cast<const char*>(data), size)};
    input = holdfast::fuzz::Mutator(g_target->form, seeds, random_seed).Next();
  } else {
    const size_t mutated = LLVMFuzzerMutate(data, size, size_max);
    input = holdfast::fuzz::Sealed(g_target->form,
                                   std::string(reinterpret_cast<const char*>(data), mutated));
  }
  if (input.size() > size_max) input.resize(size_max);
  std::memcpy(data, input.data(), input.size());
  return input.size();
}
