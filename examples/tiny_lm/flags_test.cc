// Goal: every flag sets its option, and everything else is refused by name.
#include "examples/tiny_lm/flags.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace tiny_lm {
namespace {

using testing::HasSubstr;

TEST(Flags, EveryFlagSetsItsOption) {
  const absl::StatusOr<TrainerOptions> parsed = ParseFlags({"--corpus",
                                                            "a",
                                                            "--corpus=b",
                                                            "--steps",
                                                            "7",
                                                            "--save-every=3",
                                                            "--zero",
                                                            "3",
                                                            "--tp=2",
                                                            "--pp",
                                                            "3",
                                                            "--pp-layers",
                                                            "3,2,0",
                                                            "--layers",
                                                            "5",
                                                            "--tied",
                                                            "--micro-batch",
                                                            "2",
                                                            "--batch",
                                                            "12",
                                                            "--seed",
                                                            "5",
                                                            "--device-ms",
                                                            "1.5",
                                                            "--device-jitter=0",
                                                            "--bytes",
                                                            "3M",
                                                            "--all-reduce=4K",
                                                            "--all-to-all",
                                                            "8K",
                                                            "--faults",
                                                            "f",
                                                            "--device",
                                                            "--no-holdfast",
                                                            "--check-restore",
                                                            "--no-wait-committed-at-end",
                                                            "--flip-bit",
                                                            "rank=2,step=5,tensor=a.b,element=17,"
                                                            "bit=3",
                                                            "--flip-bit=tensor=t,state=master,"
                                                            "rank=0,step=1,element=0,bit=31",
                                                            "--save-wait-ms",
                                                            "1",
                                                            "--capture-deadline-ms",
                                                            "2",
                                                            "--commit-deadline-ms",
                                                            "3",
                                                            "--restore-deadline-ms",
                                                            "4"});
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_THAT(parsed->corpus_paths, testing::ElementsAre("a", "b"));
  EXPECT_EQ(parsed->steps, 7U);
  EXPECT_EQ(parsed->save_every, 3U);
  EXPECT_EQ(parsed->parallel.zero, Zero::kParameters);
  EXPECT_EQ(parsed->parallel.tp, 2U);
  EXPECT_EQ(parsed->parallel.pp, 3U);
  EXPECT_THAT(parsed->parallel.pp_layers, testing::ElementsAre(3, 2, 0));
  EXPECT_EQ(parsed->model().layers, 5U);
  EXPECT_TRUE(parsed->model().tied);
  EXPECT_EQ(parsed->micro_batch, 2U);
  EXPECT_EQ(parsed->batch, 12U);
  EXPECT_EQ(parsed->seed, 5U);
  EXPECT_EQ(parsed->device_ms, 1.5);
  EXPECT_EQ(parsed->device_jitter_percent, 0);
  EXPECT_EQ(parsed->ballast_bytes, 3U << 20);
  EXPECT_EQ(parsed->all_reduce_bytes, 4096U);
  EXPECT_EQ(parsed->all_to_all_bytes, 8192U);
  EXPECT_EQ(parsed->faults_path, "f");
  EXPECT_TRUE(parsed->use_device);
  EXPECT_FALSE(parsed->use_holdfast);
  EXPECT_TRUE(parsed->check_restore);
  EXPECT_FALSE(parsed->wait_committed_at_end);
  ASSERT_EQ(parsed->bit_flips.size(), 2U);
  const BitFlip& first = parsed->bit_flips[0];
  EXPECT_EQ(first.rank, 2U);
  EXPECT_EQ(first.step, 5U);
  EXPECT_EQ(first.tensor, "a.b");
  EXPECT_EQ(first.state, "param");
  EXPECT_EQ(first.element, 17U);
  EXPECT_EQ(first.bit, 3U);
  EXPECT_EQ(parsed->bit_flips[1].state, "master");
  EXPECT_EQ(parsed->bit_flips[1].bit, 31U);
  EXPECT_EQ(parsed->checkpointing.save_wait_ns, 1'000'000);
  EXPECT_EQ(parsed->checkpointing.capture_deadline_ns, 2'000'000);
  EXPECT_EQ(parsed->checkpointing.commit_deadline_ns, 3'000'000);
  EXPECT_EQ(parsed->checkpointing.restore_deadline_ns, 4'000'000);
}

TEST(Flags, WhatIsWrongIsNamed) {
  const std::pair<std::vector<std::string>, const char*> cases[] = {
      {{}, "--corpus"},
      {{"--corpus", "a", "--stepps", "3"}, "'--stepps'"},
      {{"--corpus", "a", "extra"}, "'extra'"},
      {{"--corpus", "a", "--steps"}, "--steps: expected N"},
      {{"--corpus", "a", "--steps", "-1"}, "found '-1'"},
      {{"--corpus", "a", "--steps", "3x"}, "found '3x'"},
      {{"--corpus", "a", "--zero", "4"}, "--zero: expected 0, 1, 2 or 3, found '4'"},
      {{"--corpus", "a", "--zero", "12"}, "found '12'"},
      {{"--corpus", "a", "--tp", "0"}, "--tp: expected a number from 1 to 1024, found '0'"},
      {{"--corpus", "a", "--pp-layers", "2,,1"}, "--pp-layers: expected numbers of layers"},
      {{"--corpus", "a", "--pp-layers", "2,-1"}, "found '2,-1'"},
      {{"--corpus", "a", "--batch", "0"}, "from 1 to 4096"},
      {{"--corpus", "a", "--device-ms", "nan"}, "--device-ms"},
      {{"--corpus", "a", "--no-holdfast=1"}, "--no-holdfast: expected no value"},
      {{"--corpus", "a", "--bytes", "1T"}, "found '1T'"},
      {{"--corpus", "a", "--flip-bit", "rank=1"}, "--flip-bit: expected rank=R,step=S"},
      {{"--corpus", "a", "--flip-bit", "rank=1,step=1,tensor=,element=1,bit=1"}, "expected rank=R"},
      {{"--corpus", "a", "--flip-bit", "rank=1,step=x,tensor=t,element=1,bit=1"}, "step=x"},
      {{"--corpus", "a", "--flip-bit", "rank=1,rank=1,step=1,tensor=t,element=1,bit=1"}, "rank=1,"},
      {{"--corpus", "a", "--flip-bit", "rank=1,step=1,tensor=t,element=1,bit=1,b=2"}, "b=2"},
  };
  for (const auto& [arguments, text] : cases) {
    const absl::Status status = ParseFlags(arguments).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(text));
  }
}

TEST(Flags, ALayoutReplacesWhatItNames) {
  ParallelOptions options;
  options.tp = 2;
  options.pp = 2;
  options.pp_layers = {2, 0};
  ASSERT_TRUE(ApplyLayout("dp=3", 12, options).ok());
  EXPECT_EQ(options.tp, 2U);
  EXPECT_EQ(options.pp_layers.size(), 2U);
  EXPECT_EQ(options.zero, Zero::kOptimizer);
  ASSERT_TRUE(ApplyLayout("tp=1,pp=3,dp=1,zero=0", 3, options).ok());
  EXPECT_EQ(options.tp, 1U);
  EXPECT_EQ(options.pp, 3U);
  EXPECT_TRUE(options.pp_layers.empty());
  EXPECT_EQ(options.zero, Zero::kReplicated);
  for (const char* text : {"", "tp", "tp=", "tp=0", "tp=1025", "tp=2,tp=2", "zero=4", "zero=-1",
                           "sp=2", "tp=2,", "dp=2"}) {
    const absl::Status status = ApplyLayout(text, 3, options);
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << text;
    EXPECT_THAT(std::string(status.message()), HasSubstr(text));
    EXPECT_EQ(options.pp, 3U);
  }
}

TEST(Flags, SizesHaveUnitsAndALimit) {
  EXPECT_EQ(*ParseSize("0"), 0U);
  EXPECT_EQ(*ParseSize("4096"), 4096U);
  EXPECT_EQ(*ParseSize("4K"), 4096U);
  EXPECT_EQ(*ParseSize("1MiB"), 1048576U);
  EXPECT_EQ(*ParseSize("2GB"), uint64_t{2} << 30);
  EXPECT_EQ(*ParseSize("1048576G"), uint64_t{1} << 50);
  for (const char* text :
       {"", "M", "1048577G", "-1", "1KM", "1Bi", "1.5M", "99999999999999999999"}) {
    EXPECT_FALSE(ParseSize(text).ok()) << text;
  }
}

TEST(Flags, TheUsageNamesThem) {
  EXPECT_THAT(Usage(), HasSubstr("--bytes SIZE"));
  EXPECT_THAT(Usage(), HasSubstr("--check-restore"));
}

}  // namespace
}  // namespace tiny_lm
