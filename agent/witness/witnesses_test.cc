// All witnesses of a job together: a real server of RAS's protocol, a program in the place of
// holdfast-witness that prints what a test wants, a real file as the kernel's log. Time passes only
// when the test says so.
#include "agent/witness/witnesses.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fstream>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "agent/process.h"
#include "agent/witness/ras_server_testing.h"
#include "base/check.h"
#include "base/clock.h"
#include "io/epoll_loop.h"
#include "io/thread_pool.h"
#include "monitor/testimony.h"
#include "tests/support/sim_executor.h"
#include "tests/support/status_matchers.h"
#include "tests/support/temporary_directory.h"

namespace holdfast {
namespace {

using monitor::Claim;
using monitor::Source;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

constexpr char kRasReport[] = R"({"communicators": [{"hash": "0xa1", "size": 3, "ranks": [
{"rank": 0, "host": "h", "pid": 1000, "status": {"async_error": 0}, "collective_counts": {"AllReduce": 9}},
{"rank": 1, "host": "h", "pid": 1001, "status": {"async_error": 0}, "collective_counts": {"AllReduce": 8}},
{"rank": 2, "host": "h", "pid": 1002, "status": {"async_error": 0}, "collective_counts": {"AllReduce": 9}}],
"missing_ranks": []}]})";

// In which whoever dumps it is inside the first operation.
constexpr char kDump[] =
    R"({"version":"2.10","entries":[{"collective_seq_id":1,"process_group":["0","default_pg"],)"
    R"("profiling_name":"gloo:all_reduce","retired":false,"input_sizes":[[2]]}]})";

class WitnessesTest : public testing::Test {
 protected:
  WitnessesTest() {
    std::ofstream(log_path_) << "old\n";
    // The GPU at 3b:00 is hot and used by process 1001, which stands elsewhere.
    WriteHelper(
        "gpus) echo '{\"gpus\": [{\"index\": 0, \"pci_address\": \"00000000:3B:00.0\", "
        "\"throttle_reasons\": 64, \"processes\": [1001]}]}';;\n"
        "stacks) place=step; [ $2 = 1001 ] && place=load\n"
        "  printf 'thread %d main\\n  poll (libc.so.6)\\n  %s (app)\\n' $2 $place;;\n");
  }
  void WriteHelper(const std::string& cases) {
    std::ofstream script(helper_path_);
    script << "#!/bin/sh\ncase $1 in\n" << cases << "esac\n";
    script.close();
    CHECK(chmod(helper_path_.c_str(), 0700) == 0);
  }

  Witnesses::Options OptionsWith(std::optional<RasAddress> ras) {
    Witnesses::Options options;
    options.node = "n0";
    options.helper_path = helper_path_;
    options.ras = std::move(ras);
    options.kernel_log = log_path_;
    options.warn = [this](const std::string& text) { warnings_.push_back(text); };
    options.on_xid = [this](const XidSighting& sighting) { xids_.push_back(sighting); };
    return options;
  }
  void Make(std::optional<RasAddress> ras) {
    witnesses_ = std::make_unique<Witnesses>(
        OptionsWith(std::move(ras)),
        Witnesses::World{
            executor_, executor_, executor_, waiting_, [] { return Processes(); },
            [this](Witnesses::Hearing hearing) { heard_.push_back(std::move(hearing)); }});
    witnesses_->Start();
  }
  static std::vector<Witnesses::Process> Processes() {
    return {{"job", "key", 10, 1000},
            {"job", "key", 11, 1001},
            {"job", "key", 12, 1002},
            {"other", "", 0, 2000}};
  }
  bool Ask(Witnesses::Depth depth = Witnesses::Depth::kAll) {
    Witnesses::Question question;
    question.job = "job";
    question.attempt_key = "key";
    question.world_size = 16;
    question.depth = depth;
    question.processes = {Processes()[0], Processes()[1], Processes()[2]};
    over_ = false;
    return witnesses_->Ask(std::move(question), [this] { over_ = true; });
  }
  // Rank 11 waits; answers with `dump` once it is asked, as often as it is.
  void WaitWith(const std::string& dump) {
    WaitingProcesses::Process process{"job", "key", 11, 16, 1001};
    EXPECT_OK(waiting_.Arrive(1, process, answer_, std::move(parts_),
                              [this, dump](const abi::WitnessAsk& ask) {
                                answer_ = {};
                                answer_.number = ask.number;
                                answer_.parts = abi::kWitnessFlightRecord;
                                answer_.bytes[0] = dump.size();
                                parts_.clear();
                                parts_.push_back(*SealedMemfd("dump", dump));
                                executor_.Post([this, dump] { WaitWith(dump); });
                              }));
  }
  // The last word of a source about the job.
  const Witnesses::Hearing* Of(Source source) const {
    for (auto hearing = heard_.rbegin(); hearing != heard_.rend(); ++hearing) {
      if (hearing->witness.source == source) return &*hearing;
    }
    return nullptr;
  }
  void Log(const std::string& line) {
    std::ofstream(log_path_, std::ios::app) << line << "\n";
    executor_.AdvanceTime(KernelLog::kLookEvery);
  }

  const TemporaryDirectory directory_;
  const std::string log_path_ = directory_.Join("kern.log");
  const std::string helper_path_ = directory_.Join("helper");
  SimExecutor executor_;
  WaitingProcesses waiting_{executor_};
  abi::WitnessWait answer_{};
  std::vector<UniqueFd> parts_;
  std::vector<Witnesses::Hearing> heard_;
  std::vector<std::string> warnings_;
  std::vector<XidSighting> xids_;
  bool over_ = false;
  std::unique_ptr<Witnesses> witnesses_;
};

TEST_F(WitnessesTest, EverySourceIsHeard) {
  const RasServer server(RasServer::Kind::kJson, kRasReport);
  Make(server.address());
  WaitWith(kDump);
  ASSERT_TRUE(Ask());
  EXPECT_FALSE(Ask());  // once within kRoundInterval
  executor_.AdvanceTime(Witnesses::kRasApart);
  EXPECT_TRUE(over_);
  EXPECT_THAT(heard_, SizeIs(5));
  for (const Witnesses::Hearing& hearing : heard_) {
    EXPECT_EQ(hearing.job, "job");
    EXPECT_TRUE(hearing.witness.heard) << hearing.witness.why;
    if (hearing.witness.source == Source::kKernelLog) continue;
    ASSERT_THAT(hearing.testimonies, SizeIs(1)) << hearing.witness.why;
    // All of them are about the same rank, each found in its own way.
    EXPECT_THAT(hearing.testimonies[0].ranks, ElementsAre(Rank{11}));
    EXPECT_EQ(hearing.testimonies[0].node, "n0");
  }
  EXPECT_EQ(Of(Source::kFlightRecorder)->testimonies[0].claim, Claim::kEntered);
  EXPECT_EQ(Of(Source::kStacks)->testimonies[0].claim, Claim::kOddStack);
  EXPECT_THAT(
      Of(Source::kStacks)->testimonies[0].sentence,
      HasSubstr("rank 11 stands in load (app), at poll (libc.so.6), the 2 others in step (app)"));
  EXPECT_EQ(Of(Source::kNvml)->testimonies[0].claim, Claim::kGpuImpaired);
  EXPECT_EQ(Of(Source::kRas)->testimonies[0].claim, Claim::kBehind);
  EXPECT_THAT(Of(Source::kKernelLog)->testimonies, IsEmpty());
  EXPECT_THAT(witnesses_->states(), SizeIs(5));

  heard_.clear();
  executor_.AdvanceTime(Witnesses::kRoundInterval - Witnesses::kRasApart);
  EXPECT_TRUE(Ask());
}

// A job that runs is not looked at from outside, and whoever waits is not asked.
TEST_F(WitnessesTest, LessIsAskedOfAJobThatRuns) {
  Make(std::nullopt);
  WaitWith(kDump);
  ASSERT_TRUE(Ask(Witnesses::Depth::kGpus));
  executor_.RunUntilIdle();
  EXPECT_TRUE(over_);
  EXPECT_THAT(heard_, SizeIs(2));
  EXPECT_NE(Of(Source::kNvml), nullptr);
  EXPECT_NE(Of(Source::kKernelLog), nullptr);
  heard_.clear();
  ASSERT_TRUE(Ask(Witnesses::Depth::kRecords));  // each depth has its own interval
  executor_.RunUntilIdle();
  EXPECT_TRUE(over_);
  EXPECT_THAT(heard_, SizeIs(1));
  ASSERT_NE(Of(Source::kFlightRecorder), nullptr);
  EXPECT_TRUE(Of(Source::kFlightRecorder)->witness.heard);
}

TEST_F(WitnessesTest, AnXidIsToldToTheRankWhoseGpuItIs) {
  Make(std::nullopt);
  // By the process in the line.
  Log("Nov 26 11:00:00 h kernel: NVRM: Xid (PCI:0000:3b:00): 79, pid=1002, name=python, GPU has "
      "fallen off the bus.");
  ASSERT_THAT(heard_, SizeIs(1));
  EXPECT_EQ(heard_[0].job, "job");
  ASSERT_THAT(heard_[0].testimonies, SizeIs(1));
  EXPECT_EQ(heard_[0].testimonies[0].claim, Claim::kGpuFault);
  EXPECT_EQ(heard_[0].testimonies[0].code, 79);
  EXPECT_THAT(heard_[0].testimonies[0].ranks, ElementsAre(Rank{12}));
  EXPECT_THAT(warnings_, ElementsAre(HasSubstr("of rank 12")));
  ASSERT_THAT(xids_, SizeIs(1));
  EXPECT_EQ(xids_[0].xid.code, 79);
  EXPECT_EQ(xids_[0].xid.process, 1002);
  EXPECT_EQ(xids_[0].gpu_index, std::nullopt);  // NVML was not asked yet

  // The line names no process, and nobody knows the GPU yet: said to the operator only.
  heard_.clear();
  Log("NVRM: Xid (PCI:0000:3b:00): 48, pid='<unknown>', name=<unknown>, DBE");
  EXPECT_THAT(heard_, IsEmpty());
  EXPECT_THAT(warnings_.back(), HasSubstr("which rank uses it is not known"));

  // By NVML's processes. The same again at once is not told.
  witnesses_->LookAtGpus();
  executor_.RunUntilIdle();
  Log("NVRM: Xid (PCI:0000:3b:00): 48, pid='<unknown>', name=<unknown>, DBE");
  EXPECT_THAT(heard_, IsEmpty());
  executor_.AdvanceTime(Witnesses::kRoundInterval);
  Log("NVRM: Xid (PCI:0000:3b:00): 48, pid='<unknown>', name=<unknown>, DBE");
  ASSERT_THAT(heard_, SizeIs(1));
  EXPECT_THAT(heard_[0].testimonies[0].ranks, ElementsAre(Rank{11}));
  // Whomever it concerns, and with the GPU's number once that is known.
  ASSERT_THAT(xids_, SizeIs(3));
  EXPECT_EQ(xids_[1].gpu_index, std::nullopt);
  EXPECT_TRUE(xids_[2].gpu_index.has_value());

  // No Xid, one that says nothing of the GPU, and one of another GPU.
  heard_.clear();
  Log("NVRM: loading");
  Log("NVRM: Xid (PCI:0000:3b:00): 43, pid=1002, name=python, Ch 00000010");
  Log("NVRM: Xid (PCI:0000:5e:00): 79, pid='<unknown>', name=<unknown>, x");
  for (const Witnesses::Hearing& hearing : heard_) {
    for (const monitor::Testimony& said : hearing.testimonies) {
      EXPECT_LT(said.certainty, 0.9) << said.sentence;
    }
  }
}

TEST_F(WitnessesTest, WhoIsAbsentIsSaidWithTheReason) {
  RasAddress nobody;
  {
    const RasServer server(RasServer::Kind::kJson, "");
    nobody = server.address();
  }
  ASSERT_EQ(unlink(helper_path_.c_str()), 0);
  ASSERT_EQ(unlink(log_path_.c_str()), 0);
  Make(nobody);
  ASSERT_TRUE(Ask());
  executor_.AdvanceTime(Witnesses::kRasApart);
  EXPECT_TRUE(over_);
  EXPECT_THAT(heard_, SizeIs(5));
  for (const Witnesses::Hearing& hearing : heard_) {
    EXPECT_FALSE(hearing.witness.heard);
    EXPECT_THAT(hearing.testimonies, IsEmpty());
    EXPECT_NE(hearing.witness.why, "");
  }
  EXPECT_THAT(Of(Source::kRas)->witness.why, HasSubstr("refused"));
  EXPECT_THAT(Of(Source::kKernelLog)->witness.why, HasSubstr(log_path_));
  EXPECT_THAT(Of(Source::kFlightRecorder)->witness.why, HasSubstr("witness.start()"));
  EXPECT_THAT(Of(Source::kStacks)->witness.why, HasSubstr("rank 10"));
}

TEST_F(WitnessesTest, WhatIsSwitchedOffIsSaid) {
  Make(std::nullopt);
  ASSERT_TRUE(Ask());
  executor_.AdvanceTime(Witnesses::kRasApart);
  EXPECT_EQ(Of(Source::kRas)->witness.why, "ras_address = off");
}

// Whatever a process hands over: it is named with the reason, and the others are heard.
TEST_F(WitnessesTest, AHostileDumpIsNamedAndHarmsNobody) {
  Make(std::nullopt);
  for (const std::string& dump : {std::string("c__builtin__\neval\n."), std::string("{"),
                                  std::string(), std::string(1 << 20, '[')}) {
    SCOPED_TRACE(dump.substr(0, 20));
    heard_.clear();
    WaitWith(dump);
    ASSERT_TRUE(Ask());
    executor_.AdvanceTime(Witnesses::kRoundInterval);
    ASSERT_NE(Of(Source::kFlightRecorder), nullptr);
    EXPECT_FALSE(Of(Source::kFlightRecorder)->witness.heard);
    EXPECT_THAT(Of(Source::kFlightRecorder)->witness.why, HasSubstr("rank 11: "));
    EXPECT_TRUE(Of(Source::kStacks)->witness.heard);
    waiting_.Leave(1);
    answer_ = {};
    parts_.clear();
  }
}

// A helper that never ends is ended, and the agent's loop did not wait for it (the pool did).
TEST_F(WitnessesTest, AHelperThatHangsIsGivenUp) {
  WriteHelper("gpus) exec sleep 1000;;\nstacks) exec sleep 1000;;\n");
  Make(std::nullopt);
  ASSERT_TRUE(Ask(Witnesses::Depth::kGpus));
  executor_.RunUntilIdle();
  EXPECT_TRUE(over_);
  EXPECT_THAT(Of(Source::kNvml)->witness.why, HasSubstr("no answer in time"));
}

// It goes while all of them are asked: nothing of it is used afterwards.
TEST_F(WitnessesTest, GoingInTheMiddleIsHarmless) {
  const RasServer server(RasServer::Kind::kJson, kRasReport);
  Make(server.address());
  WaitWith(kDump);
  ASSERT_TRUE(Ask());
  for (int steps = 0; steps < 3; ++steps) executor_.RunOne();
  heard_.clear();
  witnesses_.reset();
  executor_.AdvanceTime(Witnesses::kRoundInterval);
  EXPECT_THAT(heard_, IsEmpty());
  EXPECT_FALSE(over_);
}

// The same on a real loop, real threads and a real clock, for the sanitizers; and again, but it
// goes in the middle.
TEST_F(WitnessesTest, AskingOnRealThreadsIsHeardOrDropped) {
  const RasServer server(RasServer::Kind::kJson, kRasReport);
  const std::unique_ptr<EpollLoop> loop = *EpollLoop::Create(RealClock());
  for (const bool stays : {true, false}) {
    std::unique_ptr<ThreadPool> pool = *ThreadPool::Create(*loop, Witnesses::kPoolThreads);
    WaitingProcesses waiting(*loop);
    size_t hearings = 0;
    auto witnesses = std::make_unique<Witnesses>(
        OptionsWith(server.address()),
        Witnesses::World{*loop, *pool, RealClock(), waiting, [] { return Processes(); },
                         [&](const Witnesses::Hearing&) { ++hearings; }});
    witnesses->Start();
    Witnesses::Question question;
    question.job = "job";
    question.processes = Processes();
    ASSERT_TRUE(witnesses->Ask(std::move(question), [&] { loop->Stop(); }));
    if (!stays) {
      hearings = 0;
      witnesses.reset();
      pool.reset();  // what it was at is done now, and told nobody
      loop->Post([&] { loop->Stop(); });
    }
    const EventLoop::TimerId timer = loop->RunAfter(absl::Seconds(60), [&] { loop->Stop(); });
    loop->Run();
    loop->CancelTimer(timer);
    EXPECT_EQ(hearings, stays ? 5u : 0u);
    witnesses.reset();
  }
}

}  // namespace
}  // namespace holdfast
