#include "agent/witness/witnesses.h"

#include <algorithm>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "agent/witness/helper.h"
#include "checkpoint/shared_mapping.h"
#include "monitor/witness/xid.h"

namespace holdfast {
namespace {

using monitor::Source;
using monitor::StackKind;
using monitor::Testimony;

constexpr size_t kTroublesNamedMax = 4;

std::string TroubleText(std::vector<std::string> troubles) {
  const size_t more = troubles.size() - std::min(troubles.size(), kTroublesNamedMax);
  troubles.resize(troubles.size() - more);
  std::string text = absl::StrJoin(troubles, "; ");
  if (more > 0) absl::StrAppend(&text, "; and ", more, " more");
  return text;
}

std::string RankTrouble(uint32_t rank, std::string_view why) {
  return absl::StrFormat("rank %d: %s", rank, why);
}

// The ranks of these processes.
std::vector<Rank> RanksOf(const std::vector<Witnesses::Process>& all,
                          const std::vector<int64_t>& processes) {
  std::set<Rank> ranks;
  for (const Witnesses::Process& process : all) {
    if (process.rank != UINT32_MAX && std::find(processes.begin(), processes.end(),
                                                int64_t{process.process_id}) != processes.end()) {
      ranks.insert(Rank{process.rank});
    }
  }
  return {ranks.begin(), ranks.end()};
}

absl::StatusOr<std::vector<monitor::GpuReading>> ReadGpus(
    const absl::StatusOr<std::string>& printed) {
  if (!printed.ok()) return printed.status();
  return monitor::ParseGpuReadings(*printed);
}

// What one process has answered, read.
struct ReadAnswer {
  std::optional<monitor::FlightRecord> record;
  std::vector<monitor::ThreadStack> python;
  std::string record_trouble;
};

ReadAnswer Read(const WaitingProcesses::Answer& answer) {
  ReadAnswer read;
  if (answer.flight_record.memory) {
    absl::StatusOr<std::string> dump =
        ReadSealedMemory("Flight Recorder", answer.flight_record.memory.get(),
                         answer.flight_record.bytes, monitor::kFlightDumpBytesMax);
    absl::StatusOr<monitor::FlightRecord> record =
        dump.ok() ? monitor::ParseFlightRecord(Rank{answer.process.rank}, *std::move(dump))
                  : absl::StatusOr<monitor::FlightRecord>(dump.status());
    if (record.ok()) {
      read.record = *std::move(record);
    } else {
      read.record_trouble = std::string(record.status().message());
    }
  } else {
    read.record_trouble = answer.trouble.empty() ? "no dump" : answer.trouble;
  }
  if (answer.python_stacks.memory) {
    // What cannot be read is a stack that is not there.
    const absl::StatusOr<std::string> text =
        ReadSealedMemory("Python stacks", answer.python_stacks.memory.get(),
                         answer.python_stacks.bytes, monitor::kStackBytesMax);
    if (text.ok()) read.python = monitor::ParsePythonStacks(*text);
  }
  return read;
}

}  // namespace

// One round of asking; `pending` sources have not answered yet.
struct Witnesses::Round {
  Question question;
  std::function<void()> done;
  int pending = 0;

  // Of the processes that waited. Filled by the pool before the loop looks at it.
  WaitingProcesses::Round answers;
  std::vector<ReadAnswer> read;  // as `answers.answers`

  // Python's and native ones come one after the other, in any order.
  std::vector<monitor::RankStacks> stacks;
  std::vector<std::string> stack_troubles;
  int stack_parts = 0;
};

absl::Duration Witnesses::Job::last_asked() const {
  absl::Duration last = -absl::InfiniteDuration();
  for (const auto& [depth, when] : asked) last = std::max(last, when);
  return last;
}

Witnesses::Witnesses(Options options, World world)
    : options_(std::move(options)), world_(std::move(world)) {}

Witnesses::~Witnesses() = default;

void Witnesses::Start() {
  if (!options_.kernel_log.empty()) {
    kernel_log_ = std::make_unique<KernelLog>(
        world_.loop, options_.kernel_log, [this](std::string_view line) { OnKernelLine(line); });
    kernel_log_->Start();
  }
}

Witnesses::Job& Witnesses::JobOf(const std::string& name) {
  if (!jobs_.contains(name) && jobs_.size() >= kJobsMax) {
    jobs_.erase(std::min_element(jobs_.begin(), jobs_.end(), [](const auto& a, const auto& b) {
      return a.second.last_asked() < b.second.last_asked();
    }));
  }
  return jobs_[name];
}

bool Witnesses::Ask(Question question, std::function<void()> done) {
  const absl::Duration now = world_.clock.Elapsed();
  Job& job = JobOf(question.job);
  const auto asked = job.asked.find(question.depth);
  if (asked != job.asked.end() && now - asked->second < kRoundInterval) return false;
  if (question.depth != Depth::kRecords && std::exchange(job.helpers_run, true)) return false;
  job.asked[question.depth] = now;
  auto round = std::make_shared<Round>();
  round->question = std::move(question);
  round->done = std::move(done);
  switch (round->question.depth) {
    case Depth::kRecords:
      round->pending = 1;
      AskProcesses(round);
      break;
    case Depth::kGpus:
      round->pending = 1;
      AskHelpers(round);
      break;
    case Depth::kAll:
      round->pending = 3;
      AskProcesses(round);
      AskHelpers(round);
      AskRasTwice(round);
      break;
  }
  if (round->question.depth != Depth::kRecords) TellKernelLog(round->question.job, {});
  return true;
}

monitor::WitnessState Witnesses::KernelLogState() const {
  monitor::WitnessState state{Source::kKernelLog, options_.node, false, "kernel_log = off"};
  if (kernel_log_ == nullptr) return state;
  state.heard = kernel_log_->state().ok();
  state.why = state.heard ? absl::StrCat("reads ", options_.kernel_log)
                          : monitor::CutText(std::string(kernel_log_->state().message()));
  return state;
}

std::vector<monitor::WitnessState> Witnesses::states() const {
  std::vector<monitor::WitnessState> all = {KernelLogState()};
  for (const auto& [source, state] : states_) {
    // That of the kernel's log may have changed since it was told.
    if (source != Source::kKernelLog) all.push_back(state);
  }
  return all;
}

void Witnesses::Over(Round& round) {
  if (--round.pending == 0 && round.done) round.done();
}

void Witnesses::Tell(const std::string& job, Source source, bool heard, std::string why,
                     std::vector<Testimony> testimonies) {
  for (Testimony& testimony : testimonies) testimony.node = options_.node;
  monitor::WitnessState& state = states_[source];
  state = {source, options_.node, heard, monitor::CutText(std::move(why))};
  world_.heard({job, state, std::move(testimonies)});
}

// ---- What the processes tell of themselves

void Witnesses::AskProcesses(const std::shared_ptr<Round>& round) {
  const Question& question = round->question;
  const bool all = question.depth == Depth::kAll;
  const std::weak_ptr<bool> alive(alive_);
  world_.waiting.Ask(
      question.job, question.attempt_key,
      abi::kWitnessFlightRecord | (all ? abi::kWitnessPythonStacks : 0), kProcessDeadline,
      [this, alive, round, all](WaitingProcesses::Round answers) {
        if (alive.expired()) return;
        round->answers = std::move(answers);
        // One after the other: their memory is the processes', and as large as they wish.
        world_.pool.Run(
            [round] {
              for (WaitingProcesses::Answer& answer : round->answers.answers) {
                round->read.push_back(Read(answer));
                answer.flight_record.memory.Reset();
                answer.python_stacks.memory.Reset();
              }
            },
            [this, alive, round, all] {
              if (alive.expired()) return;
              TakeFlightRecords(*round);
              if (all) {
                for (size_t i = 0; i < round->read.size(); ++i) {
                  if (round->read[i].python.empty()) continue;
                  round->stacks.push_back({Rank{round->answers.answers[i].process.rank},
                                           StackKind::kPython, std::move(round->read[i].python)});
                }
                TakeStacks(*round);
              }
              Over(*round);
            });
      });
}

void Witnesses::TakeFlightRecords(Round& round) {
  std::vector<monitor::FlightRecord> records;
  std::vector<std::string> troubles;
  uint32_t world_size = round.question.world_size;
  for (size_t i = 0; i < round.read.size(); ++i) {
    const WaitingProcesses::Process& process = round.answers.answers[i].process;
    world_size = std::max(world_size, process.world_size);
    if (round.read[i].record.has_value()) {
      records.push_back(*std::move(round.read[i].record));
    } else {
      troubles.push_back(RankTrouble(process.rank, round.read[i].record_trouble));
    }
  }
  for (const WaitingProcesses::Process& process : round.answers.silent) {
    troubles.push_back(RankTrouble(
        process.rank, absl::StrFormat("no answer within %s (it is stopped, or a call holds its "
                                      "interpreter)",
                                      absl::FormatDuration(kProcessDeadline))));
  }
  std::string why = TroubleText(std::move(troubles));
  if (round.answers.answers.empty() && round.answers.silent.empty()) {
    why =
        "no process of the job waits to be asked: holdfast.witness.start() was not called "
        "(Python)";
  } else if (!records.empty()) {
    why = absl::StrFormat("%d ranks%s%s", records.size(), why.empty() ? "" : "; not ", why);
  }
  std::vector<Testimony> said = JobOf(round.question.job)
                                    .flight.Testify(world_.clock.Elapsed(), world_size, records,
                                                    options_.learn_operations_min);
  Tell(round.question.job, Source::kFlightRecorder, !records.empty(), std::move(why),
       std::move(said));
}

// ---- Stacks and NVML

void Witnesses::AskHelpers(const std::shared_ptr<Round>& round) {
  struct Outcome {
    Gpus gpus = absl::UnavailableError("not asked");
    std::vector<monitor::RankStacks> stacks;
    std::vector<std::string> troubles;
  };
  auto outcome = std::make_shared<Outcome>();
  const bool all = round->question.depth == Depth::kAll;
  std::vector<Process> asked;
  if (all) asked = round->question.processes;
  if (asked.size() > kStacksMax) {
    outcome->troubles.push_back(
        absl::StrFormat("%d more processes were not looked at", asked.size() - kStacksMax));
    asked.resize(kStacksMax);
  }
  world_.pool.Run(
      [outcome, asked = std::move(asked), path = options_.helper_path] {
        std::vector<std::vector<std::string>> runs = {{"gpus"}};
        for (const Process& process : asked) {
          runs.push_back({"stacks", absl::StrCat(process.process_id)});
        }
        const std::vector<absl::StatusOr<std::string>> printed =
            RunHelpers(path, runs, {kHelperDeadline, kHelpersDeadline});
        outcome->gpus = ReadGpus(printed.front());
        for (size_t i = 0; i < asked.size(); ++i) {
          const absl::StatusOr<std::string>& text = printed[i + 1];
          if (text.ok()) {
            outcome->stacks.push_back(
                {Rank{asked[i].rank}, StackKind::kNative, monitor::ParseNativeStacks(*text)});
          } else {
            outcome->troubles.push_back(
                RankTrouble(asked[i].rank, std::string(text.status().message())));
          }
        }
      },
      [this, alive = std::weak_ptr<bool>(alive_), outcome, round, all] {
        if (alive.expired()) return;
        if (const auto job = jobs_.find(round->question.job); job != jobs_.end()) {
          job->second.helpers_run = false;
        }
        TakeGpus(*round, outcome->gpus);
        if (all) {
          for (monitor::RankStacks& one : outcome->stacks) round->stacks.push_back(std::move(one));
          round->stack_troubles = std::move(outcome->troubles);
          TakeStacks(*round);
        }
        Over(*round);
      });
}

void Witnesses::TakeStacks(Round& round) {
  if (++round.stack_parts < 2) return;
  size_t python = 0, native = 0;
  for (const monitor::RankStacks& one : round.stacks) {
    ++(one.kind == StackKind::kPython ? python : native);
  }
  std::string why = absl::StrFormat("native stacks of %d ranks, Python's of %d", native, python);
  const std::string trouble = TroubleText(std::move(round.stack_troubles));
  if (!trouble.empty()) {
    absl::StrAppend(&why, "; ", trouble);
  } else if (native + python == 0) {
    why = "no process of the job is known here";
  }
  Tell(round.question.job, Source::kStacks, native + python > 0, std::move(why),
       monitor::TestifyStacks(round.stacks));
}

void Witnesses::TakeGpus(const Round& round, const Gpus& gpus) {
  if (!gpus.ok()) {
    return Tell(round.question.job, Source::kNvml, false, std::string(gpus.status().message()), {});
  }
  gpus_ = *gpus;
  std::vector<Testimony> said = monitor::TestifyGpus(*gpus, [&](const monitor::GpuReading& gpu) {
    return RanksOf(round.question.processes, gpu.processes);
  });
  Tell(round.question.job, Source::kNvml, true, absl::StrFormat("%d GPUs", gpus->size()),
       std::move(said));
}

void Witnesses::LookAtGpus() {
  if (std::exchange(looking_at_gpus_, true)) return;
  auto gpus = std::make_shared<Gpus>(absl::UnavailableError("not asked"));
  world_.pool.Run(
      [gpus, path = options_.helper_path] {
        *gpus = ReadGpus(RunHelpers(path, {{"gpus"}}, {kHelperDeadline, kHelperDeadline}).front());
      },
      [this, alive = std::weak_ptr<bool>(alive_), gpus] {
        if (alive.expired()) return;
        looking_at_gpus_ = false;
        if (gpus->ok()) gpus_ = *std::move(*gpus);
      });
}

// ---- RAS

void Witnesses::AskRasTwice(const std::shared_ptr<Round>& round) {
  const std::string& job = round->question.job;
  if (!options_.ras.has_value()) {
    Tell(job, Source::kRas, false, "ras_address = off", {});
    return Over(*round);
  }
  struct Looks {
    absl::StatusOr<monitor::RasReport> first = absl::UnavailableError("not asked");
    absl::StatusOr<std::vector<Testimony>> said = absl::UnavailableError("not asked");
    size_t communicators = 0;
  };
  auto looks = std::make_shared<Looks>();
  const std::weak_ptr<bool> alive(alive_);
  const auto look = [address = *options_.ras]() -> absl::StatusOr<monitor::RasReport> {
    absl::StatusOr<std::string> text = AskRas(address, kRasDeadline);
    if (!text.ok()) return text.status();
    return monitor::ParseRasReport(*std::move(text));
  };
  // On the pool, as reports may be long.
  const auto compare = [looks, look, round] {
    const absl::StatusOr<monitor::RasReport> second = look();
    if (!second.ok()) {
      looks->said = second.status();
      return;
    }
    looks->communicators = second->communicators.size();
    // By the communicator's members where the board tells them; else by the process on this node.
    const auto rank_of = [&](const monitor::RasCommunicator& communicator,
                             const monitor::RasRank& rank) -> std::optional<Rank> {
      const auto members = round->question.members.find(communicator.hash);
      if (members != round->question.members.end() && rank.index < members->second.size() &&
          members->second[rank.index] >= 0) {
        return Rank{static_cast<uint32_t>(members->second[rank.index])};
      }
      const std::vector<Rank> ranks = RanksOf(round->question.processes, {rank.process});
      return ranks.size() == 1 ? std::optional(ranks.front()) : std::nullopt;
    };
    looks->said = monitor::TestifyRas(*looks->first, *second, kRasApart, rank_of);
  };
  const auto finish = [this, alive, looks, round] {
    if (alive.expired()) return;
    if (looks->said.ok()) {
      Tell(round->question.job, Source::kRas, true,
           absl::StrFormat("%d communicators", looks->communicators), *std::move(looks->said));
    } else {
      Tell(round->question.job, Source::kRas, false, std::string(looks->said.status().message()),
           {});
    }
    Over(*round);
  };
  world_.pool.Run([looks, look] { looks->first = look(); },
                  [this, alive, looks, compare, finish] {
                    if (alive.expired()) return;
                    if (!looks->first.ok()) {
                      looks->said = looks->first.status();
                      return finish();
                    }
                    world_.loop.RunAfter(kRasApart, [this, alive, compare, finish] {
                      if (!alive.expired()) world_.pool.Run(compare, finish);
                    });
                  });
}

// ---- The kernel's log

void Witnesses::TellKernelLog(const std::string& job, std::vector<Testimony> testimonies) {
  const monitor::WitnessState state = KernelLogState();
  Tell(job, Source::kKernelLog, state.heard, state.why, std::move(testimonies));
}

void Witnesses::OnKernelLine(std::string_view line) {
  const std::optional<monitor::Xid> xid = monitor::ParseXid(line);
  if (!xid.has_value()) return;
  const absl::Duration now = world_.clock.Elapsed();
  std::erase_if(xids_told_, [&](const auto& told) { return now - told.second >= kRoundInterval; });
  if (xids_told_.size() >= kXidsMax ||
      !xids_told_.try_emplace({xid->pci_address, xid->code}, now).second) {
    return;
  }
  std::vector<int64_t> processes = {xid->process};
  XidSighting sighting{*xid, std::nullopt};
  for (const monitor::GpuReading& gpu : gpus_) {
    if (gpu.pci_address == xid->pci_address) {
      sighting.gpu_index = gpu.index;
      processes.insert(processes.end(), gpu.processes.begin(), gpu.processes.end());
    }
  }
  if (options_.on_xid) options_.on_xid(sighting);
  std::map<std::string, std::vector<Process>> by_job;
  for (Process& process : world_.processes()) by_job[process.job].push_back(std::move(process));
  bool known = false;
  for (const auto& [job, members] : by_job) {
    const std::vector<Rank> ranks = RanksOf(members, processes);
    if (ranks.empty()) continue;
    std::optional<Testimony> said = monitor::TestifyXid(*xid, ranks, absl::ZeroDuration());
    if (!said.has_value()) continue;
    known = true;
    if (options_.warn) {
      options_.warn(absl::StrFormat("kernel log: job %s: %s", job, said->sentence));
    }
    TellKernelLog(job, {*std::move(said)});
  }
  const std::optional<Testimony> nobodys = monitor::TestifyXid(*xid, {}, absl::ZeroDuration());
  if (!known && nobodys.has_value() && options_.warn) {
    options_.warn(absl::StrCat("kernel log: ", nobodys->sentence));
  }
}

}  // namespace holdfast
