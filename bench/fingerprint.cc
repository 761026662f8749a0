// Speed of one core over 128 MiB, more than caches hold: prints {"gigabytes_per_second": g}.
// Usage: bench_fingerprint float32|bfloat16|portable|memcpy
#include "format/fingerprint.h"

#include <chrono>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "base/check.h"

namespace {

constexpr size_t kBytes = size_t{128} << 20;
constexpr int kRounds = 4;

}  // namespace

int main(int argc, char** argv) {
  using namespace holdfast;
  const std::string what = argc == 2 ? argv[1] : "";
  if (what != "float32" && what != "bfloat16" && what != "portable" && what != "memcpy") {
    std::fprintf(stderr, "usage: %s float32|bfloat16|portable|memcpy\n", argv[0]);
    return 2;
  }
  std::vector<std::byte> bytes(kBytes);
  std::vector<std::byte> copy(kBytes);
  std::mt19937_64 random(1);
  for (size_t at = 0; at < kBytes; at += 8) {
    const uint64_t word = random();
    std::memcpy(bytes.data() + at, &word, 8);
  }
  const Dtype dtype = what == "bfloat16" ? Dtype::kBfloat16 : Dtype::kFloat32;
  const TensorState state{"t", "param", dtype, {1024, kBytes / 1024 / ElementBytes(dtype)}};
  Fingerprinter fingerprinter =
      what == "portable" ? Fingerprinter(Fingerprinter::Kernel::kPortable) : Fingerprinter();
  Fingerprint sum;
  const auto begun = std::chrono::steady_clock::now();
  for (int round = 0; round < kRounds; ++round) {
    if (what == "memcpy") {
      std::memcpy(copy.data(), bytes.data(), kBytes);
      sum += fingerprinter.OfRun(state, 0, std::span(copy).first(64));  // the copy is used
    } else {
      sum += fingerprinter.OfRun(state, 0, bytes);
    }
  }
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begun;
  CHECK(sum != Fingerprint());
  std::printf("{\"gigabytes_per_second\": %.3f}\n",
              static_cast<double>(kBytes) * kRounds / took.count() / 1e9);
  return 0;
}
