// For tests of other readings of layout documents (tests/layout_schema_test.py): prints COUNT
// random documents of the oracle that fit, made from SEED, each behind its length in bytes and a
// newline.
#include <cstdio>
#include <string>

#include "absl/strings/numbers.h"
#include "format/layout.h"
#include "format/layout_oracle.h"

int main(int argc, char** argv) {
  uint64_t count = 0;
  uint64_t seed = 0;
  if (argc != 3 || !absl::SimpleAtoi(argv[1], &count) || !absl::SimpleAtoi(argv[2], &seed)) {
    std::fprintf(stderr, "usage: layout_oracle_documents COUNT SEED\n");
    return 2;
  }
  holdfast::oracle::Random random(seed);
  while (count > 0) {
    const std::string json = holdfast::oracle::ToJson(
        holdfast::oracle::RandomDocument(random, holdfast::oracle::RandomTensors(random)), random);
    if (!holdfast::Layout::Parse(json).ok()) continue;
    std::printf("%zu\n%s", json.size(), json.c_str());
    --count;
  }
  return std::fflush(stdout) == 0 ? 0 : 1;
}
