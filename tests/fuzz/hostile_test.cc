// Every target of targets.h over its seeds, every mutation of them that can be enumerated, and
// random ones. Besides what the targets CHECK: no input may allocate more than its target's bound,
// and none may take longer than the watchdog waits.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <new>
#include <string>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "hook/abi/messages.h"
#include "tests/fuzz/mutator.h"
#include "tests/fuzz/targets.h"
#include "tests/support/allocation_meter.h"

namespace holdfast::fuzz {
namespace {

constexpr uint64_t kRandomSeed = 20261126;
// Enumerated mutations of larger seeds would take minutes; they are mutated at random.
constexpr size_t kEnumeratedBytesMax = 4096;
// Of processor time, for one input. No input takes a hundredth of it; what hangs is named.
constexpr int kInputSecondsMax = 60;

// What is running: whatever ends the program names it first.
char g_what[512];

constexpr int kSignals[] = {SIGABRT, SIGSEGV, SIGBUS, SIGFPE, SIGPROF};
struct sigaction g_before[std::size(kSignals)];

// Only what a signal handler may do. Who handled the signal before goes on: a sanitizer's report,
// the end of the program.
void OnSignal(int number) {
  constexpr char kSlow[] = ": more than a minute of processor time\n";
  constexpr char kFailed[] = ": a CHECK failed, or a crash\n";
  const std::string_view text = number == SIGPROF ? kSlow : kFailed;
  (void)!write(STDERR_FILENO, g_what, std::strlen(g_what));
  (void)!write(STDERR_FILENO, text.data(), text.size());
  for (size_t i = 0; i < std::size(kSignals); ++i) {
    if (kSignals[i] == number) sigaction(number, &g_before[i], nullptr);
  }
  if (number == SIGPROF) _exit(1);
}

void StartWatchdog() {
  const itimerval limit = {{0, 0}, {kInputSecondsMax, 0}};
  CHECK(setitimer(ITIMER_PROF, &limit, nullptr) == 0);
}

class Driver {
 public:
  explicit Driver(const Target& target) : target_(target) {
    struct sigaction action = {};
    action.sa_handler = OnSignal;
    for (size_t i = 0; i < std::size(kSignals); ++i) {
      CHECK(sigaction(kSignals[i], &action, &g_before[i]) == 0);
    }
  }
  ~Driver() {
    const itimerval none = {};
    CHECK(setitimer(ITIMER_PROF, &none, nullptr) == 0);
    for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &g_before[i], nullptr);
  }

  // By default what the target may allocate for an input of this size.
  void Run(const std::string& input, const std::string& what) {
    Run(input, what, target_.memory_base_bytes + target_.memory_factor * input.size());
  }
  void Run(const std::string& input, const std::string& what, size_t bytes_max) {
    const std::string name = absl::StrFormat("%s: %s", std::string(target_.name), what);
    std::snprintf(g_what, sizeof(g_what), "%s", name.c_str());
    StartWatchdog();
    try {
      const AllocationMeter meter(bytes_max);
      accepted_ += target_.run({reinterpret_cast<const uint8_t*>(input.data()), input.size()});
      if (meter.GrowthPeak() > peak_bytes_) {
        peak_bytes_ = meter.GrowthPeak();
        peak_what_ = what;
      }
    } catch (const std::bad_alloc&) {
      ADD_FAILURE() << name << ": allocates more than " << bytes_max << " bytes for "
                    << input.size() << " bytes of input";
    }
    ++cases_;
  }

  size_t cases() const { return cases_; }
  size_t accepted() const { return accepted_; }
  size_t peak_bytes() const { return peak_bytes_; }
  const std::string& peak_what() const { return peak_what_; }

 private:
  const Target& target_;
  size_t cases_ = 0;
  size_t accepted_ = 0;
  size_t peak_bytes_ = 0;
  std::string peak_what_;
};

class HostileTest : public testing::TestWithParam<Target> {};

TEST_P(HostileTest, InputsCostBoundedMemoryAndTimeAndAreRefusedOrUsable) {
  const Target& target = GetParam();
  const std::vector<std::string> seeds = SeedsOf(target);
  ASSERT_FALSE(seeds.empty());
  Driver driver(target);
  for (size_t i = 0; i < seeds.size(); ++i) {
    const auto run = [&](const std::string& input, const std::string& what) {
      driver.Run(input, absl::StrFormat("seed %d, %s", i, what));
    };
    if (seeds[i].size() <= kEnumeratedBytesMax && target.enumerates) {
      EnumerateMutations(target.form, seeds[i], run);
    } else {
      run(seeds[i], "as it is");
    }
  }
  for (const CorpusInput& input : CorpusOf(target)) driver.Run(input.bytes, input.name);
  Mutator mutator(target.form, seeds, kRandomSeed);
  for (size_t i = 0; i < target.random_cases; ++i) {
    driver.Run(mutator.Next(), absl::StrFormat("random mutation %d of seed %d", i, kRandomSeed));
  }
  printf("%s: %zu inputs, %zu accepted, random seed %llu, at most %zu KiB allocated (%s)\n",
         std::string(target.name).c_str(), driver.cases(), driver.accepted(),
         static_cast<unsigned long long>(kRandomSeed), driver.peak_bytes() >> 10,
         driver.peak_what().c_str());
  // Not vacuous: some of both.
  EXPECT_GT(driver.accepted(), 0u);
  EXPECT_GT(driver.cases(), driver.accepted());
}

std::string Repeated(const std::string& text, size_t count) {
  std::string all;
  for (size_t i = 0; i < count; ++i) all += text;
  return all;
}

// A hundred patterns of as many parts as they can have. The same text for all if `is_shared`.
std::string ManyParts(bool is_shared) {
  constexpr uint32_t kCount = 100;
  constexpr uint32_t kTextBytes = 4096;
  std::string input(sizeof(abi::RestoreSelection), '\0');
  const abi::RestoreSelection header = {abi::kProtocolMagic, abi::kProtocolVersion, kCount};
  std::memcpy(input.data(), &header, sizeof(header));
  for (uint64_t i = 0; i < kCount; ++i) {
    const abi::SelectionPattern entry = {
        sizeof(header) + kCount * sizeof(entry) + (is_shared ? 0 : i * kTextBytes), kTextBytes,
        abi::SelectionPattern::kTensors};
    input.append(reinterpret_cast<const char*>(&entry), sizeof(entry));
  }
  return input + Repeated("*a", (is_shared ? 1 : kCount) * kTextBytes / 2);
}

// What is allocated for any input at all, beside the factor.
constexpr size_t kLargeInputBaseBytes = size_t{1} << 20;

// Large inputs of what is smallest in the text and largest in memory. The base that some targets
// have is for short texts that ask for much; it would hide the factor here.
TEST(LargeInputs, CostNoMoreThanTheirFactor) {
  std::string members = "{";
  for (uint32_t i = 0; i < 60'000; ++i) absl::StrAppend(&members, "\"", i, "\":1,");
  std::string tensors;
  for (uint32_t i = 0; i < 50; ++i) {
    absl::StrAppendFormat(&tensors, R"(%s{"name":"%s%d","shape":[%s1],"states":[)", i ? "," : "",
                          std::string(4000, 'n'), i, Repeated("1,", 31));
    for (uint32_t s = 0; s < 8; ++s) {
      absl::StrAppendFormat(&tensors, R"(%s{"state":"%d","dtype":"int8"})", s ? "," : "", s);
    }
    tensors += "]}";
  }
  const struct {
    std::string target;
    std::string what;
    std::string input;
  } inputs[] = {
      {"json", "numbers", absl::StrCat("[", Repeated("1,", 200'000), "1]")},
      {"json", "empty arrays", absl::StrCat("[", Repeated("[],", 200'000), "1]")},
      {"json", "nested arrays", absl::StrCat("[", Repeated("[[1]],", 60'000), "1]")},
      {"json", "members", absl::StrCat(members, "\"x\":1}")},
      {"json", "escapes", absl::StrCat("\"", Repeated("\\u00e9", 500'000), "\"")},
      {"json", "nested too deep", std::string(4'000'000, '[')},
      {"layout", "long names",
       absl::StrCat(R"({"holdfast_layout":1,"mesh":[],"tensors":[)", tensors, "]}")},
      {"layout", "operations",
       absl::StrCat(R"({"holdfast_layout":1,"mesh":[],"placements":{"p":[)",
                    Repeated(R"({"op":"perm","dims":[]},)", 63), R"({"op":"perm","dims":[]}]},)",
                    R"("tensors":[]})")},
      {"sealed_files", "images",
       Sealed(Form::kSealedText, absl::StrCat("{\n\"images\": [", Repeated("{},", 500'000),
                                              "{}],\n", "\"crc32c\": \"00000000\"}\n"))},
      {"selection", "patterns of many parts", ManyParts(/*is_shared=*/false)},
      {"selection", "one text for many patterns", ManyParts(/*is_shared=*/true)},
  };
  for (const auto& each : inputs) {
    const Target& target = *FindTarget(each.target);
    Driver driver(target);
    driver.Run(each.input, each.what,
               kLargeInputBaseBytes + target.memory_factor * each.input.size());
    printf("%s, %s: %.1f bytes allocated for each byte\n", each.target.c_str(), each.what.c_str(),
           static_cast<double>(driver.peak_bytes()) / static_cast<double>(each.input.size()));
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, HostileTest,
                         testing::ValuesIn(Targets().begin(), Targets().end()),
                         [](const testing::TestParamInfo<Target>& target) {
                           return std::string(target.param.name);
                         });

}  // namespace
}  // namespace holdfast::fuzz
