// The session under an agent that dies, returns, is replaced, refuses, talks nonsense or is silent;
// and what every call says meanwhile.
#include "hook/link.h"

#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "hook/test_agent.h"
#include "hook/test_job.h"

namespace holdfast::hook {
namespace {

using abi::MessageType;
using abi::SlotState;
using Fault = TestAgent::Fault;

class LinkTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::mt19937 random(1);
    buffers_.Add("b", 10'000, 0, random);
    plan_.block_count = 3;
    plan_.ops.push_back({100, 0, 10'000, 1, 0, 0, 0});
    agent_.SetPlan([this](const TestDocument&) { return plan_; });
  }
  Error Open(int64_t deadline_ns = kPatienceNs) {
    Result<std::unique_ptr<Job>> job =
        Job::Open(TestSettings(agent_), &reader_, 1, Deadline::After(deadline_ns));
    if (!job.ok()) return job.error();
    job_ = std::move(job.value());
    return Error();
  }
  void OpenAndRegister() {
    ASSERT_TRUE(Open().ok());
    const Error error = RegisterAll(*job_, buffers_);
    ASSERT_TRUE(error.ok()) << error.text();
  }
  hf_info Info() {
    hf_info info = {};
    job_->GetInfo(&info);
    return info;
  }
  bool AwaitConnected(uint32_t connected) {
    return agent_.Await([&] { return Info().connected == connected; });
  }
  bool AwaitReconnects(uint32_t count) {
    return agent_.Await([&] { return Info().reconnect_count >= count; });
  }
  Error SaveAndWait(uint64_t step) {
    if (Error error = job_->Save(step, NoOptions()); !error.ok()) return error;
    return job_->WaitCaptured(HF_ALL_GROUPS, Deadline::After(kPatienceNs));
  }

  TestAgent agent_;
  HostSourceReader reader_;
  TestBuffers buffers_;
  TestPlan plan_;
  std::unique_ptr<Job> job_;
};

TEST_F(LinkTest, TheAgentIsToldWhoOpensAndWhatIsRegistered) {
  Settings settings = TestSettings(agent_);
  settings.job = std::string(128, 'j');
  settings.attempt_key = std::string(255, 'k');
  settings.root = "/" + std::string(1022, 'r');
  settings.restore_from = "/" + std::string(1022, 'f');
  Result<std::unique_ptr<Job>> job = OpenTestJob(settings, &reader_);
  ASSERT_TRUE(job.ok()) << job.error().text();
  const abi::OpenRequest request = agent_.last_open();
  EXPECT_EQ(request.job, settings.job);
  EXPECT_EQ(request.attempt_key, settings.attempt_key);
  EXPECT_EQ(request.root, settings.root);
  EXPECT_EQ(request.restore_from, settings.restore_from);
  EXPECT_EQ(request.rank, 2u);
  EXPECT_EQ(request.world_size, 4u);
  EXPECT_EQ(request.local_rank, 2u);
  EXPECT_EQ(request.resume_session_id, 0u);

  const std::string layout = "{\"l\": \"" + std::string(300'000, 'x') + "\"}";
  const std::string long_name(4096, 'n');
  const std::vector<hf_buffer> buffers = {{"a/b", buffers_.data(0).data(), 7, 63},
                                          {long_name.c_str(), nullptr, 0, 0}};
  const std::vector<hf_blob_slot> blobs = {{"rng", HF_BLOB_RANK, 12},
                                           {"\xc3\xa4", HF_BLOB_GLOBAL, 0}};
  plan_ = TestPlan();
  plan_.block_count = 1;
  plan_.blobs = {{0, 12}, {UINT64_MAX, 0}};
  const Error error =
      job.value()->Register(layout.c_str(), buffers, blobs, Deadline::After(kPatienceNs));
  ASSERT_TRUE(error.ok()) << error.text();
  const TestDocument& document = agent_.document();
  EXPECT_EQ(document.layout, layout);
  EXPECT_EQ(document.buffer_names, (std::vector<std::string>{"a/b", long_name}));
  EXPECT_EQ(document.buffers[0].bytes, 7u);
  EXPECT_EQ(document.buffers[0].group, 63u);
  EXPECT_EQ(document.blob_names, (std::vector<std::string>{"rng", "\xc3\xa4"}));
  EXPECT_EQ(document.blobs[0].scope, 1u);
  EXPECT_EQ(document.blobs[0].capacity_bytes, 12u);
}

// The answer of an agent that was just about to end: the next one takes the process.
TEST_F(LinkTest, AnAgentThatIsEndingIsWaitedForAndThenTheNextOneIsOpened) {
  agent_.FailNext(MessageType::kOpen, Fault::kEnding);
  const Error opened = Open();
  ASSERT_TRUE(opened.ok()) << opened.text();
  EXPECT_EQ(agent_.messages(MessageType::kOpen), 2);
  job_.reset();

  // One that does not end in time says why there was nothing to open, once it has answered.
  agent_.FailAlways(MessageType::kOpen, Fault::kEnding);
  Error ending;
  for (int64_t deadline_ns = 200 * kNsPerMs; deadline_ns < kPatienceNs; deadline_ns *= 4) {
    ending = Open(deadline_ns);
    if (ending.code() != HF_DEADLINE_EXCEEDED) break;
  }
  EXPECT_EQ(ending.code(), HF_UNAVAILABLE);
  EXPECT_STREQ(ending.text(), "refused by the script");
}

TEST_F(LinkTest, ARestartedWorkerResumesTheSessionWithItsRegistration) {
  OpenAndRegister();
  ASSERT_TRUE(SaveAndWait(1).ok());
  const uint64_t session = agent_.page().session_id;
  agent_.RestartWorker();
  ASSERT_TRUE(AwaitReconnects(1));
  const abi::OpenRequest resumed = agent_.last_open();
  EXPECT_EQ(resumed.resume_session_id, session);
  EXPECT_EQ(resumed.resume_attempt, 1u);
  EXPECT_EQ(resumed.resume_registration_id, agent_.shared().registration_id);
  EXPECT_EQ(agent_.messages(MessageType::kRegister), 1);
  // The image that was there still is, and the other slot takes the next.
  EXPECT_EQ(agent_.shared().slots[0].state.load(), SlotState::kCaptured);
  EXPECT_TRUE(SaveAndWait(2).ok());
  EXPECT_EQ(agent_.shared().slots[1].state.load(), SlotState::kCaptured);
  // The bell is the new worker's.
  EXPECT_TRUE(agent_.Await([&] { return agent_.doorbell_rings() > 0; }));
}

TEST_F(LinkTest, ANewAgentGetsTheRegistrationAgainAndSectionsReturn) {
  OpenAndRegister();
  ASSERT_TRUE(SaveAndWait(1).ok());
  job_->BeginSection("forward");
  job_->Beat(17);
  // Registering, saving and waiting held the loop up, and it is in none of them now.
  const uint64_t held_ns = agent_.page().held_ns.load();
  EXPECT_GT(held_ns, 0u);
  EXPECT_EQ(agent_.page().held_since_ns.load(), 0);
  agent_.ReplaceAgent();
  ASSERT_TRUE(AwaitReconnects(1));
  EXPECT_EQ(agent_.messages(MessageType::kRegister), 2);
  EXPECT_TRUE(agent_.Await([&] { return agent_.page().section_depth.load() == 1; }));
  EXPECT_STREQ(agent_.page().section_names[0], "forward");
  EXPECT_EQ(agent_.page().held_ns.load(), held_ns);
  job_->EndSection();
  EXPECT_EQ(agent_.page().section_depth.load(), 0u);
  job_->Beat(18);
  EXPECT_EQ(agent_.page().heartbeat_step.load(), 18u);
  // What the old agent had is lost, and said to be.
  EXPECT_EQ(job_->WaitCommitted(1, 0, Deadline::After(kPatienceNs)).code(), HF_ABORTED);
  hf_save_report report = {};
  ASSERT_TRUE(job_->Report(1, &report).ok());
  EXPECT_EQ(report.state, HF_SAVE_FAILED);
  ASSERT_TRUE(SaveAndWait(2).ok());
  EXPECT_EQ(FirstDifference(agent_.Image(0), OracleImage(plan_, buffers_)), -1);
  // The step that was lost may be saved again.
  EXPECT_TRUE(SaveAndWait(1).ok());
}

// Worker and keeper have died: what it waits for went with them, however long it would wait.
TEST_F(LinkTest, ASaveThatWaitsForAnImageOfADeadAgentTakesOneOfTheNext) {
  std::atomic<int> registrations = 0;
  agent_.SetPlan([&](const TestDocument&) {
    TestPlan plan = plan_;
    if (registrations.fetch_add(1) == 0) plan.granted = 0;
    return plan;
  });
  OpenAndRegister();
  hf_save_options patient = NoOptions();
  patient.wait_ns = 24 * 3600 * kNsPerSecond;
  Error saved(HF_INTERNAL, "not yet");
  std::thread saver([&] { saved = job_->Save(1, patient); });
  EXPECT_TRUE(agent_.Await([&] { return agent_.page().held_since_ns.load() != 0; }));
  agent_.ReplaceAgent();
  saver.join();
  EXPECT_EQ(agent_.page().held_since_ns.load(), 0);
  ASSERT_TRUE(saved.ok()) << saved.text();
  ASSERT_TRUE(job_->WaitCaptured(HF_ALL_GROUPS, Deadline::After(kPatienceNs)).ok());
  EXPECT_EQ(FirstDifference(agent_.Image(0), OracleImage(plan_, buffers_)), -1);
  EXPECT_EQ(registrations.load(), 2);
}

TEST_F(LinkTest, ANewAgentThatRefusesTheRegistrationIsQuotedByTheSave) {
  OpenAndRegister();
  agent_.FailNext(MessageType::kRegister, Fault::kRefuse);
  agent_.ReplaceAgent();
  ASSERT_TRUE(AwaitReconnects(1));
  const Error error = job_->Save(1, NoOptions());
  EXPECT_EQ(error.code(), HF_INVALID_ARGUMENT);
  EXPECT_STREQ(error.text(), "refused by the script");
  EXPECT_TRUE(RegisterAll(*job_, buffers_).ok());
  EXPECT_TRUE(SaveAndWait(1).ok());
}

TEST_F(LinkTest, WithoutAnAgentEveryCallSaysSoAtOnceAndWorksAgainWhenItIsBack) {
  OpenAndRegister();
  agent_.SetRestore(TestRestore());
  ASSERT_TRUE(SaveAndWait(1).ok());
  agent_.Vanish();
  ASSERT_TRUE(AwaitConnected(0));
  // The socket's refusal, not a timer, tells a dead agent from a restarting worker.
  ASSERT_TRUE(agent_.Await([&] {
    const hf_code code = job_->Save(2, NoOptions()).code();
    // Within the grace of a restart it may still be accepted: then it is lost with the agent.
    if (code == HF_OK) (void)job_->WaitCaptured(HF_ALL_GROUPS, Deadline::After(kPatienceNs));
    return code == HF_UNAVAILABLE;
  }));
  EXPECT_TRUE(job_->WaitCaptured(HF_ALL_GROUPS, Deadline::After(0)).ok());
  hf_restore_result result = {};
  // These go on waiting for kAbsentGraceNs, unless their deadline passes before.
  const Error committed = job_->WaitCommitted(1, 0, Deadline::Never());
  EXPECT_EQ(committed.code(), HF_UNAVAILABLE) << committed.text();
  EXPECT_EQ(job_->Restore({}, &result, Deadline::Never()).code(), HF_UNAVAILABLE);
  EXPECT_EQ(RegisterAll(*job_, buffers_).code(), HF_UNAVAILABLE);
  job_->Beat(3);
  job_->BeginSection("alone");
  job_->EndSection();
  EXPECT_EQ(Info().connected, 0u);

  agent_.Return();
  ASSERT_TRUE(AwaitConnected(1));
  // hf_register has failed in between: nothing is registered.
  EXPECT_EQ(job_->Save(3, NoOptions()).code(), HF_FAILED_PRECONDITION);
  ASSERT_TRUE(RegisterAll(*job_, buffers_).ok());
  EXPECT_TRUE(SaveAndWait(4).ok());
  EXPECT_TRUE(job_->Restore({}, &result, Deadline::After(kPatienceNs)).ok());
}

TEST_F(LinkTest, AWorkerThatDiesInAnyRequestIsAskedAgain) {
  agent_.FailNext(MessageType::kOpen, Fault::kEndConnection);
  ASSERT_TRUE(Open().ok());
  EXPECT_EQ(agent_.messages(MessageType::kOpen), 2);
  agent_.FailNext(MessageType::kRegister, Fault::kEndConnection);
  ASSERT_TRUE(RegisterAll(*job_, buffers_).ok());
  EXPECT_EQ(agent_.messages(MessageType::kRegister), 2);
  agent_.SetRestore(TestRestore());
  agent_.FailNext(MessageType::kRestore, Fault::kEndConnection);
  hf_restore_result result = {};
  ASSERT_TRUE(job_->Restore({}, &result, Deadline::After(kPatienceNs)).ok());
  EXPECT_EQ(agent_.messages(MessageType::kRestore), 2);
  // Also while it resumes.
  agent_.FailNext(MessageType::kOpen, Fault::kEndConnection);
  agent_.RestartWorker();
  EXPECT_TRUE(AwaitReconnects(3));
  EXPECT_TRUE(SaveAndWait(1).ok());
}

TEST_F(LinkTest, AnAgentThatVanishesInARequestIsUnavailable) {
  agent_.FailNext(MessageType::kOpen, Fault::kVanish);
  EXPECT_EQ(Open().code(), HF_UNAVAILABLE);
  agent_.Return();
  ASSERT_TRUE(Open().ok());
  agent_.FailNext(MessageType::kRegister, Fault::kVanish);
  EXPECT_EQ(RegisterAll(*job_, buffers_).code(), HF_UNAVAILABLE);
  agent_.Return();
  ASSERT_TRUE(AwaitConnected(1));
  ASSERT_TRUE(RegisterAll(*job_, buffers_).ok());
  agent_.FailNext(MessageType::kRestore, Fault::kVanish);
  hf_restore_result result = {};
  EXPECT_EQ(job_->Restore({}, &result, Deadline::After(kPatienceNs)).code(), HF_UNAVAILABLE);
}

TEST_F(LinkTest, ASilentAgentIsLeftAtTheDeadlineAndItsLateReplyIsDropped) {
  // Whether the request came in time or not.
  agent_.FailAlways(MessageType::kOpen, Fault::kSilence);
  EXPECT_EQ(Open(kNsPerMs).code(), HF_DEADLINE_EXCEEDED);
  agent_.FailNoMore(MessageType::kOpen);
  agent_.RestartWorker();
  ASSERT_TRUE(Open().ok());
  // Given up at once, or within a millisecond: the reply may come in time, late or be lost.
  for (int64_t deadline_ns = 0; deadline_ns < 40 * kNsPerMs / 20; deadline_ns += kNsPerMs / 20) {
    const Error error = job_->Register("{}", buffers_.List(), {}, Deadline::After(deadline_ns));
    EXPECT_TRUE(error.ok() || error.code() == HF_DEADLINE_EXCEEDED) << error.text();
  }
  ASSERT_TRUE(RegisterAll(*job_, buffers_).ok());
  EXPECT_TRUE(SaveAndWait(1).ok());
}

// Every wrong answer ends in an error or another try, and a good agent afterwards in success.
TEST_F(LinkTest, WrongAnswersAreRefused) {
  const Fault wrong[] = {Fault::kGarbage, Fault::kShortReply, Fault::kWrongVersion, Fault::kNoFds,
                         Fault::kRefuse};
  for (const Fault fault : wrong) {
    SCOPED_TRACE("fault " + std::to_string(static_cast<int>(fault)));
    job_.reset();
    agent_.FailNext(MessageType::kOpen, fault);
    const Error opened = Open();
    EXPECT_TRUE(opened.code() == HF_INTERNAL || opened.code() == HF_INVALID_ARGUMENT)
        << opened.text();
    if (fault == Fault::kWrongVersion) {
      EXPECT_NE(std::string(opened.text()).find("77"), std::string::npos) << opened.text();
    }
    ASSERT_TRUE(Open().ok());

    agent_.FailNext(MessageType::kRegister, fault);
    const Error registered = RegisterAll(*job_, buffers_);
    const bool breaks_connection = fault == Fault::kGarbage || fault == Fault::kWrongVersion;
    EXPECT_EQ(registered.ok(), breaks_connection) << registered.text();
    ASSERT_TRUE(RegisterAll(*job_, buffers_).ok());

    agent_.SetRestore(TestRestore());
    agent_.FailNext(MessageType::kRestore, fault);
    hf_restore_result result = {};
    const Error restored = job_->Restore({}, &result, Deadline::After(kPatienceNs));
    EXPECT_EQ(restored.ok(), breaks_connection) << restored.text();
    EXPECT_TRUE(job_->Restore({}, &result, Deadline::After(kPatienceNs)).ok());

    agent_.FailNext(MessageType::kOpen, fault);
    const uint32_t reconnects = Info().reconnect_count;
    agent_.RestartWorker();
    EXPECT_TRUE(AwaitReconnects(reconnects + 1));
    EXPECT_TRUE(SaveAndWait(1).ok());
  }
}

TEST_F(LinkTest, AFencedAttemptIsToldAtEveryCallAndAResumeThatIsRefusedIsFinal) {
  OpenAndRegister();
  ASSERT_TRUE(SaveAndWait(1).ok());
  agent_.Fence(9);
  const Error save = job_->Save(2, NoOptions());
  EXPECT_EQ(save.code(), HF_FAILED_PRECONDITION);
  EXPECT_NE(std::string(save.text()).find("attempt 9"), std::string::npos) << save.text();
  EXPECT_EQ(job_->WaitCommitted(1, 0, Deadline::Never()).code(), HF_FAILED_PRECONDITION);
  EXPECT_EQ(Info().fenced, 1u);
}

TEST_F(LinkTest, ARefusedResumeIsFinal) {
  OpenAndRegister();
  agent_.FailNext(MessageType::kOpen, Fault::kFence);
  agent_.RestartWorker();
  uint64_t step = 0;
  ASSERT_TRUE(agent_.Await([&] {
    const hf_code code = job_->Save(++step, NoOptions()).code();
    if (code == HF_OK) (void)job_->WaitCaptured(HF_ALL_GROUPS, Deadline::After(kPatienceNs));
    return code == HF_FAILED_PRECONDITION;
  }));
  EXPECT_EQ(RegisterAll(*job_, buffers_).code(), HF_FAILED_PRECONDITION);
  const int opens = agent_.messages(MessageType::kOpen);
  job_.reset();
  EXPECT_EQ(agent_.messages(MessageType::kOpen), opens);
}

TEST_F(LinkTest, ACaptureGoesOnWhileTheWorkerIsAway) {
  OpenAndRegister();
  ASSERT_TRUE(job_->Save(1, NoOptions()).ok());
  agent_.RestartWorker();
  EXPECT_TRUE(job_->WaitCaptured(HF_ALL_GROUPS, Deadline::After(kPatienceNs)).ok());
  EXPECT_EQ(agent_.shared().slots[0].state.load(), SlotState::kCaptured);
  EXPECT_EQ(FirstDifference(agent_.Image(0), OracleImage(plan_, buffers_)), -1);
}

TEST_F(LinkTest, ASaveThatTheAgentWantsIsDueAtTheFirstStepNotBelowItAndNoOther) {
  agent_.SetDueEvery(0);
  ASSERT_TRUE(Open().ok());
  EXPECT_FALSE(job_->Due(7));
  EXPECT_EQ(agent_.page().due_asked_step.load(), 7u);
  agent_.page().due_step.store(10);
  EXPECT_FALSE(job_->Due(8));
  // A loop that asks for every third step: the same answer however often it asks.
  EXPECT_TRUE(job_->Due(11));
  EXPECT_TRUE(job_->Due(11));
  EXPECT_FALSE(job_->Due(14));
  EXPECT_FALSE(job_->Due(0));
  agent_.page().due_step.store(15);
  EXPECT_TRUE(job_->Due(17));
  EXPECT_FALSE(job_->Due(18));
}

TEST_F(LinkTest, DueFollowsTheAgentsSchedule) {
  agent_.SetDueEvery(4);
  ASSERT_TRUE(Open().ok());
  for (uint64_t step = 0; step < 20; ++step) {
    EXPECT_EQ(job_->Due(step), step > 0 && step % 4 == 0) << step;
  }
  // One rank sees a fence, a loss or another agent before the next: the answer stays the same.
  const auto expect_same = [&](const char* when) {
    EXPECT_TRUE(job_->Due(4)) << when;
    EXPECT_FALSE(job_->Due(6)) << when;
  };
  agent_.Fence(5);
  expect_same("fenced");
  EXPECT_EQ(job_->Save(4, NoOptions()).code(), HF_FAILED_PRECONDITION);
  agent_.SetDueEvery(3);
  agent_.ReplaceAgent();
  ASSERT_TRUE(AwaitReconnects(1));
  expect_same("another agent");
  agent_.Vanish();
  ASSERT_TRUE(agent_.Await([&] { return job_->Save(4, NoOptions()).code() == HF_UNAVAILABLE; }));
  expect_same("no agent");
}

TEST_F(LinkTest, CommitsAreSeenByTheFaultsThatTheySurvive) {
  OpenAndRegister();
  ASSERT_TRUE(SaveAndWait(1).ok());
  const auto wait = [&](uint64_t step, uint32_t faults, int64_t deadline_ns) {
    return job_->WaitCommitted(step, faults, Deadline::After(deadline_ns)).code();
  };
  EXPECT_EQ(wait(1, 4, kPatienceNs), HF_UNIMPLEMENTED);
  EXPECT_EQ(wait(1, HF_SURVIVE_PROCESS | 1u << 31, kPatienceNs), HF_UNIMPLEMENTED);
  EXPECT_EQ(wait(99, HF_SURVIVE_PROCESS, kPatienceNs), HF_INVALID_ARGUMENT);
  EXPECT_EQ(wait(1, HF_SURVIVE_PROCESS, 0), HF_DEADLINE_EXCEEDED);
  agent_.Report(1, HF_SAVE_CAPTURED);
  EXPECT_EQ(wait(1, HF_SURVIVE_PROCESS, 0), HF_DEADLINE_EXCEEDED);
  agent_.Report(1, HF_SAVE_COMMITTED_PROCESS);
  EXPECT_EQ(wait(1, HF_SURVIVE_PROCESS, 0), HF_OK);
  EXPECT_EQ(wait(1, HF_SURVIVE_PROCESS | HF_SURVIVE_POWER, 0), HF_DEADLINE_EXCEEDED);
  // A wait that sleeps is woken, also over a worker's death.
  std::thread agent([&] {
    agent_.RestartWorker();
    AwaitReconnects(1);
    agent_.Report(1, HF_SAVE_COMMITTED_POWER);
  });
  EXPECT_EQ(wait(1, HF_SURVIVE_POWER, kPatienceNs), HF_OK);
  agent.join();
  const hf_info info = Info();
  EXPECT_EQ(info.committed_process_step, 1u);
  EXPECT_EQ(info.committed_power_step, 1u);

  ASSERT_TRUE(SaveAndWait(2).ok());
  agent_.Report(2, HF_SAVE_FAILED, HF_RESOURCE_EXHAUSTED, "no space on /mnt");
  const Error failed = job_->WaitCommitted(2, HF_SURVIVE_POWER, Deadline::Never());
  EXPECT_EQ(failed.code(), HF_RESOURCE_EXHAUSTED);
  EXPECT_STREQ(failed.text(), "no space on /mnt");
  // The older one stays committed.
  EXPECT_EQ(wait(1, HF_SURVIVE_POWER, 0), HF_OK);
}

TEST_F(LinkTest, ReportsJoinWhatBothSidesKnow) {
  OpenAndRegister();
  hf_save_report report = {};
  EXPECT_EQ(job_->Report(HF_LAST_STEP, &report).code(), HF_NOT_FOUND);
  ASSERT_TRUE(SaveAndWait(3).ok());
  ASSERT_TRUE(job_->Report(HF_LAST_STEP, &report).ok());
  EXPECT_EQ(report.step, 3u);
  EXPECT_EQ(report.state, HF_SAVE_CAPTURED);
  EXPECT_EQ(report.blocks, 3u);
  EXPECT_EQ(report.blocks_captured, 3u);
  EXPECT_EQ(report.image_bytes, 3u * 4096);
  EXPECT_GT(report.call_ns, 0);
  EXPECT_GT(report.blocked_ns, 0);
  EXPECT_GT(report.capture_ns, 0);
  agent_.Report(3, HF_SAVE_COMMITTED_POWER);
  ASSERT_TRUE(job_->Report(3, &report).ok());
  EXPECT_EQ(report.state, HF_SAVE_COMMITTED_POWER);
  agent_.Report(3, HF_SAVE_FAILED, HF_DATA_LOSS, "rotten");
  ASSERT_TRUE(job_->Report(3, &report).ok());
  EXPECT_EQ(report.state, HF_SAVE_FAILED);
  EXPECT_EQ(report.error.code, HF_DATA_LOSS);
  EXPECT_STREQ(report.error.text, "rotten");
  // The oldest is forgotten with the seventeenth.
  for (uint64_t step = 10; step < 10 + kSaveRecords; ++step) {
    ASSERT_TRUE(SaveAndWait(step).ok()) << step;
    agent_.Grant(0);
    agent_.Grant(1);
  }
  EXPECT_EQ(job_->Report(3, &report).code(), HF_NOT_FOUND);
  EXPECT_EQ(job_->Report(10, &report).code(), HF_OK);
}

// The agent that committed it is gone, the checkpoint is not.
TEST_F(LinkTest, WhatIsCommittedStaysSoWithANewAgent) {
  OpenAndRegister();
  for (const uint64_t step : {1, 2, 3}) {
    ASSERT_TRUE(SaveAndWait(step).ok());
    if (step < 3) agent_.Report(step, HF_SAVE_COMMITTED_POWER);
    agent_.Grant(0);
    agent_.Grant(1);
  }
  agent_.ReplaceAgent();
  ASSERT_TRUE(AwaitReconnects(1));
  hf_save_report report = {};
  // Before the new agent has said anything, and with what a page can say of any step.
  ASSERT_TRUE(job_->Report(2, &report).ok());
  EXPECT_EQ(report.state, HF_SAVE_FAILED);
  agent_.page().committed_power_step.store(2);
  agent_.page().committed_process_step.store(2);
  ASSERT_TRUE(job_->Report(2, &report).ok());
  EXPECT_EQ(report.state, HF_SAVE_COMMITTED_POWER);
  EXPECT_EQ(report.error.code, HF_OK);
  EXPECT_EQ(report.blocks_flushed, report.blocks);
  EXPECT_EQ(job_->WaitCommitted(2, HF_SURVIVE_POWER, Deadline::After(0)).code(), HF_OK);
  // An older one has an entry of its own.
  agent_.Report(1, HF_SAVE_COMMITTED_POWER);
  agent_.page().committed_power_step.store(2);
  ASSERT_TRUE(job_->Report(1, &report).ok());
  EXPECT_EQ(report.state, HF_SAVE_COMMITTED_POWER);
  EXPECT_EQ(job_->WaitCommitted(1, HF_SURVIVE_POWER, Deadline::After(0)).code(), HF_OK);
  // What was only in the old agent's memory is lost, and says so.
  ASSERT_TRUE(job_->Report(3, &report).ok());
  EXPECT_EQ(report.state, HF_SAVE_FAILED);
  EXPECT_EQ(report.error.code, HF_ABORTED);
  EXPECT_EQ(job_->WaitCommitted(3, HF_SURVIVE_POWER, Deadline::After(0)).code(), HF_ABORTED);
}

TEST_F(LinkTest, ASecondRegistrationReplacesTheFirst) {
  OpenAndRegister();
  ASSERT_TRUE(SaveAndWait(1).ok());
  std::mt19937 random(2);
  TestBuffers other;
  other.Add("other", 77, 1, random);
  plan_ = TestPlan();
  plan_.block_count = 1;
  plan_.ops.push_back({0, 0, 77, 1, 0, 0, 1});
  ASSERT_TRUE(RegisterAll(*job_, other).ok());
  EXPECT_EQ(Info().image_bytes, 4096u);
  ASSERT_TRUE(SaveAndWait(2).ok());
  EXPECT_EQ(FirstDifference(agent_.Image(0), OracleImage(plan_, other)), -1);
  agent_.FailNext(MessageType::kRegister, Fault::kRefuse);
  EXPECT_EQ(RegisterAll(*job_, other).code(), HF_INVALID_ARGUMENT);
  EXPECT_EQ(job_->Save(3, NoOptions()).code(), HF_FAILED_PRECONDITION);
}

TEST_F(LinkTest, DuringACaptureNeitherRegistrationNorRestoreIsPossible) {
  OpenAndRegister();
  ASSERT_TRUE(job_->Save(1, NoOptions()).ok());
  EXPECT_EQ(RegisterAll(*job_, buffers_).code(), HF_FAILED_PRECONDITION);
  hf_restore_result result = {};
  EXPECT_EQ(job_->Restore({}, &result, Deadline::Never()).code(), HF_FAILED_PRECONDITION);
  EXPECT_TRUE(job_->WaitCaptured(HF_ALL_GROUPS, Deadline::After(kPatienceNs)).ok());
}

}  // namespace
}  // namespace holdfast::hook
