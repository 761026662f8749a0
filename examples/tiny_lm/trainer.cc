#include "examples/tiny_lm/trainer.h"

#include <sys/resource.h>
#include <time.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "examples/collectives/status_macros.h"
#include "examples/tiny_lm/exact.h"

namespace tiny_lm {
namespace {

using Clock = std::chrono::steady_clock;
using FloatMilliseconds = std::chrono::duration<double, std::milli>;

std::string BytesOf(uint64_t value) {
  return std::string(reinterpret_cast<const char*>(&value), sizeof(value));
}

absl::StatusOr<uint64_t> NumberOf(const absl::StatusOr<std::string>& blob) {
  RETURN_IF_ERROR(blob.status());
  uint64_t value = 0;
  if (blob->size() != sizeof(value)) {
    return absl::DataLossError(absl::StrFormat("blob of a number: expected %d bytes, found %d",
                                               sizeof(value), blob->size()));
  }
  std::memcpy(&value, blob->data(), sizeof(value));
  return value;
}

uint64_t JitterSeed(uint64_t seed, uint32_t rank) { return Mix(Mix(seed) + rank); }

// Of this program. (getrusage would count what the launcher used before exec.) 0 if unknown.
uint64_t RssMaxBytes() {
  std::ifstream status("/proc/self/status");
  std::string word;
  uint64_t kilobytes = 0;
  while (status >> word) {
    if (word == "VmHWM:" && status >> kilobytes) return kilobytes * 1024;
  }
  return 0;
}

uint32_t RestartCount() {
  const char* text = std::getenv("TORCHELASTIC_RESTART_COUNT");
  return text == nullptr ? 0 : static_cast<uint32_t>(std::strtoul(text, nullptr, 10));
}

}  // namespace

class Trainer::Phases {
 public:
  void End(const char* name) {
    const Clock::time_point now = Clock::now();
    absl::StrAppendFormat(&text_, "%s\"%s\":%.3f", text_.empty() ? "" : ",", name,
                          FloatMilliseconds(now - began_).count());
    began_ = now;
  }
  Clock::time_point began() const { return began_; }
  const std::string& text() const { return text_; }

 private:
  Clock::time_point began_ = Clock::now();
  std::string text_;
};

Trainer::Trainer(const TrainerOptions& options, const collectives::Options& ranks, Corpus corpus)
    : options_(options),
      layout_{options.zero, ranks.rank, ranks.world_size, options.ballast_bytes},
      log_(ranks.rank),
      corpus_(std::move(corpus)),
      table_(config_),
      model_(config_),
      state_(table_, layout_, options.seed),
      sampler_(options.seed, corpus_.window_count()),
      jitter_(JitterSeed(options.seed, ranks.rank)),
      weights_(table_.element_count()),
      sample_gradient_(table_.element_count()),
      gradient_sums_(state_.parameters.size()),
      metrics_(2) {}

absl::StatusOr<std::unique_ptr<Trainer>> Trainer::Create(const TrainerOptions& options) {
  ASSIGN_OR_RETURN(const collectives::Options ranks, collectives::Options::FromEnvironment());
  ASSIGN_OR_RETURN(Corpus corpus, Corpus::Load(options.corpus_paths, ModelConfig().context + 1));
  ASSIGN_OR_RETURN(std::unique_ptr<collectives::Context> context,
                   collectives::Context::Create(ranks));
  std::unique_ptr<Trainer> trainer(new Trainer(options, ranks, std::move(corpus)));
  trainer->context_ = std::move(context);
  ASSIGN_OR_RETURN(trainer->data_parallel_, trainer->context_->CreateCommunicator("dp"));
  ASSIGN_OR_RETURN(trainer->metrics_ranks_, trainer->context_->CreateCommunicator("metrics"));
  return trainer;
}

absl::Status Trainer::Run() {
  log_.set_attempt(RestartCount());
  const absl::Status status = Train();
  if (!status.ok()) {
    log_.Print("failed",
               absl::StrFormat("\"step\":%d,\"text\":%s", step_, JsonString(status.ToString())));
  }
  return status;
}

absl::Status Trainer::Train() {
  RETURN_IF_ERROR(Restore());
  while (step_ < options_.steps) {
    RETURN_IF_ERROR(Step(step_ + 1));
    ++step_;
  }
  if (checkpointing_ != nullptr && options_.wait_committed_at_end) {
    checkpointing_->CommitLast(step_, Blobs());
  }
  RETURN_IF_ERROR(metrics_ranks_->Barrier().Wait());
  if (options_.check_restore) PrintDigests("final_digest");
  PrintFinished();
  return absl::OkStatus();
}

void Trainer::PrintFinished() const {
  rusage usage{};
  // Cannot fail with these arguments.
  static_cast<void>(getrusage(RUSAGE_SELF, &usage));
  const auto milliseconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) * 1e3 + static_cast<double>(time.tv_usec) / 1e3;
  };
  log_.Print(
      "finished",
      absl::StrFormat("\"step\":%d,\"wall_ms\":%.1f,\"cpu_ms\":%.1f,\"rss_max_bytes\":%d", step_,
                      FloatMilliseconds(Clock::now() - began_).count(),
                      milliseconds(usage.ru_utime) + milliseconds(usage.ru_stime), RssMaxBytes()));
}

// What a checkpoint must agree about to go on exactly. World size and layout may differ.
std::string Trainer::Arguments() const {
  return absl::StrFormat("{\"seed\":%d,\"batch\":%d,\"ballast_bytes\":%d,\"corpus\":\"%016x\"}",
                         options_.seed, options_.batch, options_.ballast_bytes, corpus_.digest());
}

std::vector<Blob> Trainer::Blobs() const {
  const Sampler::State& sampler = sampler_.state();
  return {{"samples_consumed", BytesOf(sampler.samples_consumed)},
          {"shuffle", BytesOf(sampler.shuffle_state)},
          {"cursor", BytesOf(sampler.cursor)},
          {"arguments", Arguments()},
          {"jitter", BytesOf(jitter_.state())}};
}

absl::Status Trainer::Restore() {
  if (!options_.use_holdfast) return AgreeOn(RestoreOutcome::kNoHoldfast);
  checkpointing_ = std::make_unique<Checkpointing>(options_.checkpointing, log_);
  if (checkpointing_->attempt() != 0) log_.set_attempt(checkpointing_->attempt());
  const std::vector<BlobSlot> slots = {{"samples_consumed", false, 8},
                                       {"shuffle", false, 8},
                                       {"cursor", false, 8},
                                       {"arguments", false, 4096},
                                       {"jitter", true, 8}};
  const RestoreOutcome outcome = checkpointing_->RegisterAndRestore(state_, slots, step_);
  RETURN_IF_ERROR(AgreeOn(outcome));
  if (outcome != RestoreOutcome::kRestored) return absl::OkStatus();
  RETURN_IF_ERROR(RestoreBlobs());
  RETURN_IF_ERROR(state_.ballast.Verify(step_));
  log_.Print("ballast_verified",
             absl::StrFormat("\"step\":%d,\"pages\":%d", step_, state_.ballast.page_count()));
  if (options_.check_restore) PrintDigests("restore_digest");
  return absl::OkStatus();
}

absl::Status Trainer::RestoreBlobs() {
  ASSIGN_OR_RETURN(const std::string arguments, checkpointing_->RestoredBlob("arguments", -1));
  if (arguments != Arguments()) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "the checkpoint was made with %s, this run has %s", arguments, Arguments()));
  }
  Sampler::State sampler;
  ASSIGN_OR_RETURN(sampler.samples_consumed,
                   NumberOf(checkpointing_->RestoredBlob("samples_consumed", -1)));
  ASSIGN_OR_RETURN(sampler.shuffle_state, NumberOf(checkpointing_->RestoredBlob("shuffle", -1)));
  ASSIGN_OR_RETURN(sampler.cursor, NumberOf(checkpointing_->RestoredBlob("cursor", -1)));
  RETURN_IF_ERROR(sampler_.Restore(sampler));
  // A rank goes on with its own generator, or, in another world, with one made from an old rank's.
  const uint32_t old_world_size = checkpointing_->restored_world_size();
  if (old_world_size == layout_.world_size) {
    ASSIGN_OR_RETURN(const uint64_t own, NumberOf(checkpointing_->RestoredBlob("jitter", -1)));
    jitter_ = Random(own);
    return absl::OkStatus();
  }
  const uint32_t old_rank = layout_.rank % old_world_size;
  ASSIGN_OR_RETURN(const uint64_t old, NumberOf(checkpointing_->RestoredBlob("jitter", old_rank)));
  jitter_ = Random(JitterSeed(old, layout_.rank));
  return absl::OkStatus();
}

absl::Status Trainer::AgreeOn(RestoreOutcome outcome) {
  const uint32_t size = layout_.world_size;
  // (outcome, step) of every rank.
  std::vector<int64_t> all(2 * size, 0);
  all[2 * layout_.rank] = static_cast<int64_t>(outcome);
  all[2 * layout_.rank + 1] = static_cast<int64_t>(step_);
  RETURN_IF_ERROR(metrics_ranks_->AllReduce(std::span(all)).Wait());
  for (uint32_t rank = 0; rank < size; ++rank) {
    const RestoreOutcome other = static_cast<RestoreOutcome>(all[2 * rank]);
    const int64_t other_step = all[2 * rank + 1];
    if (other == RestoreOutcome::kFailed) {
      return absl::AbortedError(absl::StrFormat("rank %d could not restore", rank));
    }
    if (other_step != static_cast<int64_t>(step_)) {
      return absl::AbortedError(absl::StrFormat("rank %d begins after step %d, rank %d after %d",
                                                rank, other_step, layout_.rank, step_));
    }
  }
  return absl::OkStatus();
}

void Trainer::PrintDigests(const std::string& event) const {
  std::vector<std::string> texts;
  for (const Piece& piece : state_.Pieces()) {
    texts.push_back(absl::StrFormat(
        "{\"tensor\":%s,\"state\":\"%s\",\"begin\":%d,\"count\":%d,\"replicated\":%s,"
        "\"digest\":\"%016x\"}",
        JsonString(piece.tensor), piece.state, piece.begin, piece.count,
        piece.replicated ? "true" : "false", DigestOf(piece)));
  }
  const Sampler::State& sampler = sampler_.state();
  log_.Print(event, absl::StrFormat("\"step\":%d,\"samples_consumed\":%d,\"shuffle\":\"%016x\","
                                    "\"cursor\":%d,\"jitter\":\"%016x\",\"pieces\":[%s]",
                                    step_, sampler.samples_consumed, sampler.shuffle_state,
                                    sampler.cursor, jitter_.state(), absl::StrJoin(texts, ",")));
}

std::vector<size_t> Trainer::NextWindows() {
  const collectives::Segment mine =
      collectives::SegmentOf(options_.batch, layout_.world_size, layout_.rank);
  std::vector<size_t> windows;
  for (uint64_t i = 0; i < options_.batch; ++i) {
    const size_t window = sampler_.Next();
    if (i >= mine.begin && i < mine.begin + mine.count) windows.push_back(window);
  }
  return windows;
}

void Trainer::ForwardBackward(const std::vector<size_t>& windows) {
  std::transform(state_.parameters.begin(),
                 state_.parameters.begin() + static_cast<ptrdiff_t>(weights_.size()),
                 weights_.begin(), FromBfloat16);
  std::fill(gradient_sums_.begin(), gradient_sums_.end(), 0);
  std::fill(metrics_.begin(), metrics_.end(), 0);
  // The sample is the block of the sum over the batch: its gradient is rounded once.
  for (const size_t window : windows) {
    std::fill(sample_gradient_.begin(), sample_gradient_.end(), 0.0F);
    const float loss =
        model_.LossAndGradient(weights_, corpus_.Window(window), sample_gradient_, metrics_[1]);
    metrics_[0] += ToFixedPoint(loss, metrics_[1]);
    for (size_t i = 0; i < sample_gradient_.size(); ++i) {
      gradient_sums_[i] += ToFixedPoint(sample_gradient_[i], metrics_[1]);
    }
  }
}

// Waits as long as a device would have computed since `began`. Waiting, not spinning: the ranks of
// a test share few cores.
void Trainer::WaitForDevice(Clock::time_point began) {
  const double longer = 1 + jitter_.Uniform() * options_.device_jitter_percent / 100;
  if (options_.device_ms <= 0) return;
  const auto until = std::chrono::duration_cast<std::chrono::nanoseconds>(
      began.time_since_epoch() + FloatMilliseconds(options_.device_ms * longer));
  timespec deadline{};
  deadline.tv_sec = static_cast<time_t>(until.count() / 1'000'000'000);
  deadline.tv_nsec = static_cast<long>(until.count() % 1'000'000'000);
  while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &deadline, nullptr) == EINTR) {
  }
}

absl::Status Trainer::SumOverRanks() {
  const collectives::Handle metrics = metrics_ranks_->AllReduce(std::span(metrics_));
  const collectives::Handle gradients =
      options_.zero == Zero::kReplicated ? data_parallel_->AllReduce(std::span(gradient_sums_))
                                         : data_parallel_->ReduceScatter(std::span(gradient_sums_));
  RETURN_IF_ERROR(gradients.Wait());
  return metrics.Wait();
}

absl::Status Trainer::OptimizerStep() {
  const Slice own = state_.own();
  ++state_.optimizer_step;
  AdamStep(AdamConfig(), state_.optimizer_step,
           std::span(gradient_sums_).subspan(own.begin, own.count), options_.batch,
           {state_.master, state_.exp_avg, state_.exp_avg_sq,
            std::span(state_.parameters).subspan(own.begin, own.count)});
  state_.ballast.Stamp(static_cast<uint64_t>(state_.optimizer_step));
  if (options_.zero == Zero::kReplicated) return absl::OkStatus();
  return data_parallel_->AllGather(std::span(state_.parameters)).Wait();
}

absl::Status Trainer::Step(uint64_t step) {
  if (checkpointing_ != nullptr) checkpointing_->Heartbeat(step);
  Phases phases;
  const uint64_t first_sample = sampler_.state().samples_consumed;
  const std::vector<size_t> windows = NextWindows();
  phases.End("data");
  const Clock::time_point began = phases.began();
  ForwardBackward(windows);
  WaitForDevice(began);
  phases.End("forward_backward");
  RETURN_IF_ERROR(SumOverRanks());
  phases.End("allreduce");
  // The optimizer changes what the last save may still be reading.
  if (checkpointing_ != nullptr) checkpointing_->WaitCaptured();
  phases.End("wait_captured");
  RETURN_IF_ERROR(OptimizerStep());
  phases.End("optimizer");
  if (checkpointing_ != nullptr) {
    const bool due =
        options_.save_every > 0 ? step % options_.save_every == 0 : checkpointing_->Due(step);
    if (due) checkpointing_->Save(step, Blobs());
  }
  phases.End("save");
  PrintStep(step, first_sample, phases);
  if (checkpointing_ != nullptr) checkpointing_->PrintReports();
  return absl::OkStatus();
}

void Trainer::PrintStep(uint64_t step, uint64_t first_sample, const Phases& phases) const {
  const double loss = FromFixedPoint(metrics_[0]) / static_cast<double>(options_.batch);
  log_.Print("step", absl::StrFormat(
                         "\"step\":%d,\"samples\":[%d,%d],\"loss\":\"%a\",\"loss_decimal\":%.4f,"
                         "\"overflows\":%d,\"ms\":{%s}",
                         step, first_sample, first_sample + options_.batch, loss, loss, metrics_[1],
                         phases.text()));
}

}  // namespace tiny_lm
