#include "agent/witness/waiting_processes.h"

#include <string.h>

#include <bit>
#include <memory>
#include <utility>

#include "absl/strings/str_format.h"

namespace holdfast {
namespace {

absl::Status CheckParts(const abi::WitnessWait& wait, size_t descriptors) {
  constexpr uint32_t kAll = abi::kWitnessFlightRecord | abi::kWitnessPythonStacks;
  if ((wait.parts & ~kAll) != 0 || descriptors != static_cast<size_t>(std::popcount(wait.parts))) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "witness: parts %#x: expected a descriptor for each of 0x1 and 0x2, found %d", wait.parts,
        descriptors));
  }
  return absl::OkStatus();
}

WaitingProcesses::Part TakePart(const abi::WitnessWait& wait, uint32_t part,
                                std::vector<UniqueFd>& parts) {
  if ((wait.parts & part) == 0) return {};
  // They come by ascending bit.
  const auto index = static_cast<size_t>(std::popcount(wait.parts & (part - 1)));
  return {std::move(parts[index]), wait.bytes[std::countr_zero(part)]};
}

bool IsOfAttempt(const std::string& key, const std::string& asked) {
  return key.empty() || asked.empty() || key == asked;
}

}  // namespace

WaitingProcesses::~WaitingProcesses() {
  for (const auto& [number, open] : open_) loop_.CancelTimer(open.timer);
}

absl::Status WaitingProcesses::Arrive(uint64_t id, Process process, const abi::WitnessWait& wait,
                                      std::vector<UniqueFd> parts,
                                      std::function<void(const abi::WitnessAsk&)> ask) {
  const auto known = waiting_.find(id);
  if (known == waiting_.end() && waiting_.size() >= kWaitingMax) {
    return absl::ResourceExhaustedError(
        absl::StrFormat("witness: %d processes wait already, the limit", waiting_.size()));
  }
  if (known != waiting_.end() && known->second.ask != nullptr) {
    return absl::FailedPreconditionError("witness: this connection waits already");
  }
  if (absl::Status checked = CheckParts(wait, parts.size()); !checked.ok()) return checked;
  Waiting& waiting = waiting_[id];
  waiting.process = process;
  waiting.ask = std::move(ask);
  // Not inside of what has just come of it.
  if (!waiting.next.empty()) {
    loop_.Post([this, alive = std::weak_ptr<bool>(alive_), id] {
      if (!alive.expired()) AskNext(id);
    });
  }
  const auto open = open_.find(wait.number);
  // What is too late, or was not asked, is an answer to nobody.
  if (open == open_.end() || open->second.awaited.erase(id) == 0) return absl::OkStatus();
  Answer answer;
  answer.process = std::move(process);
  answer.flight_record = TakePart(wait, abi::kWitnessFlightRecord, parts);
  answer.python_stacks = TakePart(wait, abi::kWitnessPythonStacks, parts);
  answer.trouble.assign(wait.trouble, strnlen(wait.trouble, sizeof(wait.trouble)));
  open->second.round.answers.push_back(std::move(answer));
  if (open->second.awaited.empty()) Finish(wait.number);
  return absl::OkStatus();
}

void WaitingProcesses::Leave(uint64_t id) {
  if (waiting_.erase(id) == 0) return;
  std::vector<uint64_t> over;
  for (auto& [number, open] : open_) {
    const auto awaited = open.awaited.find(id);
    if (awaited == open.awaited.end()) continue;
    open.round.silent.push_back(std::move(awaited->second));
    open.awaited.erase(awaited);
    if (open.awaited.empty()) over.push_back(number);
  }
  for (const uint64_t number : over) Finish(number);
}

void WaitingProcesses::Ask(const std::string& job, const std::string& attempt_key, uint32_t parts,
                           absl::Duration deadline, std::function<void(Round)> done) {
  const uint64_t number = next_number_++;
  Open& open = open_[number];
  open.done = std::move(done);
  abi::WitnessAsk ask{};
  ask.number = number;
  ask.parts = parts;
  std::vector<std::function<void(const abi::WitnessAsk&)>> asks;
  for (auto& [id, waiting] : waiting_) {
    const Process& process = waiting.process;
    if (process.job != job || !IsOfAttempt(process.attempt_key, attempt_key)) continue;
    open.awaited.emplace(id, process);
    if (waiting.ask == nullptr) {
      // Those of rounds that are over go: of each open round there is one.
      std::erase_if(waiting.next,
                    [this](const abi::WitnessAsk& one) { return !open_.contains(one.number); });
      waiting.next.push_back(ask);
      continue;
    }
    asks.push_back(std::exchange(waiting.ask, nullptr));
  }
  open.timer = loop_.RunAfter(open.awaited.empty() ? absl::ZeroDuration() : deadline,
                              [this, number] { Finish(number); });
  // Last: asking may find that a process has gone, and end the round.
  for (const auto& one : asks) one(ask);
}

void WaitingProcesses::AskNext(uint64_t id) {
  const auto found = waiting_.find(id);
  if (found == waiting_.end()) return;
  Waiting& waiting = found->second;
  while (waiting.ask != nullptr && !waiting.next.empty()) {
    const abi::WitnessAsk ask = waiting.next.front();
    waiting.next.pop_front();
    if (!open_.contains(ask.number)) continue;
    // Last: asking may find that it has gone.
    return std::exchange(waiting.ask, nullptr)(ask);
  }
}

void WaitingProcesses::Finish(uint64_t number) {
  const auto found = open_.find(number);
  if (found == open_.end()) return;
  Open open = std::move(found->second);
  open_.erase(found);
  loop_.CancelTimer(open.timer);
  for (auto& [id, process] : open.awaited) open.round.silent.push_back(std::move(process));
  // Not inside whatever has just happened to a connection.
  loop_.Post([done = std::move(open.done), round = std::make_shared<Round>(std::move(open.round))] {
    done(std::move(*round));
  });
}

std::vector<WaitingProcesses::Process> WaitingProcesses::processes() const {
  std::vector<Process> all;
  for (const auto& [id, waiting] : waiting_) all.push_back(waiting.process);
  return all;
}

}  // namespace holdfast
