#include "examples/tiny_lm/trainer.h"

#include <sys/resource.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "examples/collectives/device.h"
#include "examples/collectives/status_macros.h"
#include "examples/tiny_lm/exact.h"
#include "examples/tiny_lm/layout_document.h"
#include "examples/tiny_lm/optimizer.h"
#include "examples/tiny_lm/sections.h"

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

// 0 if there is none.
uint32_t NumberIn(const char* variable) {
  const char* text = std::getenv(variable);
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

Trainer::Trainer(const TrainerOptions& options, const JobLayout& layout, uint32_t rank,
                 Corpus corpus)
    : options_(options),
      rank_(rank),
      log_(rank),
      corpus_(std::move(corpus)),
      table_(options.model()),
      partition_(table_, layout, rank),
      state_(partition_, options.seed),
      sampler_(options.seed, corpus_.window_count()),
      jitter_(JitterSeed(options.seed, rank)),
      faults_(options.faults_path, rank),
      weights_(partition_.slot_count()),
      metrics_(2) {
  const uint64_t share_max = collectives::SegmentOf(options.batch, layout.mesh.dp, 0).count;
  micro_batch_count_ = (share_max + options.micro_batch - 1) / options.micro_batch;
  sums_.gradients.resize(partition_.slot_count());
}

absl::StatusOr<std::unique_ptr<Trainer>> Trainer::Create(const TrainerOptions& options) {
  ASSIGN_OR_RETURN(const collectives::Options ranks, collectives::Options::FromEnvironment());
  ASSIGN_OR_RETURN(const JobLayout layout, MakeJobLayout(options.parallel, options.layers,
                                                         ranks.world_size, options.ballast_bytes));
  ASSIGN_OR_RETURN(Corpus corpus, Corpus::Load(options.corpus_paths, ModelConfig().context + 1));
  ASSIGN_OR_RETURN(std::unique_ptr<collectives::Context> context,
                   collectives::Context::Create(ranks));
  std::unique_ptr<Trainer> trainer(new Trainer(options, layout, ranks.rank, std::move(corpus)));
  RETURN_IF_ERROR(trainer->Join(std::move(context)));
  if (options.use_device) RETURN_IF_ERROR(trainer->PlaceOnDevice());
  return trainer;
}

absl::Status Trainer::Join(std::unique_ptr<collectives::Context> context) {
  context_ = std::move(context);
  const Mesh& mesh = partition_.layout().mesh;
  const Coordinates& at = partition_.at();
  const auto join = [&](std::unique_ptr<collectives::Communicator>& communicator,
                        const std::string& name,
                        const std::vector<uint32_t>& ranks) -> absl::Status {
    if (ranks.size() < 2) return absl::OkStatus();
    ASSIGN_OR_RETURN(communicator, context_->CreateCommunicator(name, ranks));
    return absl::OkStatus();
  };
  ASSIGN_OR_RETURN(metrics_ranks_, context_->CreateCommunicator("metrics"));
  const std::vector<uint32_t> stages = mesh.Stages(at);
  RETURN_IF_ERROR(
      join(data_ranks_, absl::StrFormat("dp.pp%d.tp%d", at.pp, at.tp), mesh.DataRanks(at)));
  RETURN_IF_ERROR(
      join(tensor_ranks_, absl::StrFormat("tp.pp%d.dp%d", at.pp, at.dp), mesh.TensorRanks(at)));
  RETURN_IF_ERROR(join(stages_, absl::StrFormat("pp.dp%d.tp%d", at.dp, at.tp), stages));
  if (options_.tied && mesh.pp > 1 && (partition_.is_first_stage() || partition_.is_last_stage())) {
    RETURN_IF_ERROR(join(tied_stages_, absl::StrFormat("tied.dp%d.tp%d", at.dp, at.tp),
                         {stages.front(), stages.back()}));
  }
  if (options_.all_reduce_bytes + options_.all_to_all_bytes > 0) {
    ASSIGN_OR_RETURN(traffic_ranks_, context_->CreateCommunicator("traffic"));
    traffic_ = std::make_unique<Traffic>(*traffic_ranks_, options_.all_reduce_bytes,
                                         options_.all_to_all_bytes);
  }
  const size_t samples_max = std::min(
      options_.micro_batch, uint64_t{collectives::SegmentOf(options_.batch, mesh.dp, 0).count});
  model_ =
      std::make_unique<Model<float>>(options_.model(), partition_, TensorGroup(tensor_ranks_.get()),
                                     UnderWayMax(at.pp, mesh.pp, micro_batch_count_), samples_max);
  pipeline_ = std::make_unique<Pipeline>(
      *model_, stages_.get(), micro_batch_count_,
      [this](Pass pass, const std::function<absl::Status()>& perform) {
        const Section section(job(), pass == Pass::kForward ? "forward" : "backward");
        return perform();
      });
  data_parallel_ =
      std::make_unique<DataParallel>(partition_, state_, data_ranks_.get(), tied_stages_.get());
  return absl::OkStatus();
}

absl::Status Trainer::Run() {
  log_.set_attempt(NumberIn("TORCHELASTIC_RESTART_COUNT"));
  const absl::Status status = Train();
  if (!status.ok()) {
    log_.Print("failed",
               absl::StrFormat("\"step\":%d,\"text\":%s", step_, JsonString(status.ToString())));
  }
  return status;
}

absl::Status Trainer::PlaceOnDevice() {
  std::vector<std::span<std::byte>> host;
  for (const StateBuffer& buffer : state_.Buffers()) {
    host.emplace_back(static_cast<std::byte*>(buffer.data), buffer.bytes);
  }
  ASSIGN_OR_RETURN(device_, cuda::DeviceBuffers::Create(std::move(host), NumberIn("LOCAL_RANK")));
  return Store();
}

std::vector<StateBuffer> Trainer::Tensors() {
  std::vector<StateBuffer> tensors = state_.Buffers();
  if (device_ == nullptr) return tensors;
  for (size_t i = 0; i < tensors.size(); ++i) tensors[i].data = device_->data(i);
  return tensors;
}

absl::Status Trainer::Fetch() { return device_ == nullptr ? absl::OkStatus() : device_->Fetch(); }

absl::Status Trainer::Store() { return device_ == nullptr ? absl::OkStatus() : device_->Store(); }

absl::Status Trainer::Train() {
  RETURN_IF_ERROR(Restore());
  while (step_ < options_.steps) {
    RETURN_IF_ERROR(Step(step_ + 1));
    ++step_;
  }
  if (checkpointing_ != nullptr && options_.wait_committed_at_end) {
    const Section section(job(), "checkpoint");
    checkpointing_->CommitLast(step_, Blobs());
  }
  RETURN_IF_ERROR(metrics_ranks_->Barrier().Wait());
  RETURN_IF_ERROR(Fetch());
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
  return absl::StrFormat(
      "{\"seed\":%d,\"batch\":%d,\"ballast_bytes\":%d,\"corpus\":\"%016x\",\"layers\":%d,"
      "\"tied\":%s}",
      options_.seed, options_.batch, options_.ballast_bytes, corpus_.digest(), options_.layers,
      options_.tied ? "true" : "false");
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
  // Makes the monitor's board, before the agent is asked for: so that it gets it.
  const Section section(nullptr, "restore");
  if (!options_.use_holdfast) return AgreeOn(RestoreOutcome::kNoHoldfast);
  checkpointing_ = std::make_unique<Checkpointing>(
      options_.checkpointing, device_ == nullptr ? nullptr : device_->stream(), log_);
  if (checkpointing_->attempt() != 0) log_.set_attempt(checkpointing_->attempt());
  const std::vector<BlobSlot> slots = {{"samples_consumed", false, 8},
                                       {"shuffle", false, 8},
                                       {"cursor", false, 8},
                                       {"arguments", false, 4096},
                                       {"jitter", true, 8}};
  const RestoreOutcome outcome = checkpointing_->RegisterAndRestore(
      LayoutDocument(table_, partition_.layout()), Tensors(), slots, step_);
  RETURN_IF_ERROR(AgreeOn(outcome));
  if (outcome != RestoreOutcome::kRestored) return absl::OkStatus();
  RETURN_IF_ERROR(RestoreBlobs());
  RETURN_IF_ERROR(Fetch());
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
  if (old_world_size == partition_.layout().mesh.world_size()) {
    ASSIGN_OR_RETURN(const uint64_t own, NumberOf(checkpointing_->RestoredBlob("jitter", -1)));
    jitter_ = Random(own);
    return absl::OkStatus();
  }
  const uint32_t old_rank = rank_ % old_world_size;
  ASSIGN_OR_RETURN(const uint64_t old, NumberOf(checkpointing_->RestoredBlob("jitter", old_rank)));
  jitter_ = Random(JitterSeed(old, rank_));
  return absl::OkStatus();
}

absl::Status Trainer::AgreeOn(RestoreOutcome outcome) {
  const uint32_t size = partition_.layout().mesh.world_size();
  // (outcome, step) of every rank.
  std::vector<int64_t> all(2 * size, 0);
  all[2 * rank_] = static_cast<int64_t>(outcome);
  all[2 * rank_ + 1] = static_cast<int64_t>(step_);
  RETURN_IF_ERROR(metrics_ranks_->AllReduce(std::span(all)).Wait());
  for (uint32_t rank = 0; rank < size; ++rank) {
    const RestoreOutcome other = static_cast<RestoreOutcome>(all[2 * rank]);
    const int64_t other_step = all[2 * rank + 1];
    if (other == RestoreOutcome::kFailed) {
      return absl::AbortedError(absl::StrFormat("rank %d could not restore", rank));
    }
    if (other_step != static_cast<int64_t>(step_)) {
      return absl::AbortedError(absl::StrFormat("rank %d begins after step %d, rank %d after %d",
                                                rank, other_step, rank_, step_));
    }
  }
  return absl::OkStatus();
}

void Trainer::PrintDigests(const std::string& event) const {
  std::vector<std::string> texts;
  for (const Piece& piece : state_.Pieces()) {
    texts.push_back(
        absl::StrFormat("{\"tensor\":%s,\"state\":\"%s\",\"first\":%d,\"count\":%d,\"replica\":%d,"
                        "\"digest\":\"%016x\"}",
                        JsonString(piece.tensor), piece.state, piece.index.Of(piece.begin),
                        piece.count, piece.replica, DigestOf(piece)));
  }
  const Sampler::State& sampler = sampler_.state();
  log_.Print(event, absl::StrFormat("\"step\":%d,\"samples_consumed\":%d,\"shuffle\":\"%016x\","
                                    "\"cursor\":%d,\"jitter\":\"%016x\",\"pieces\":[%s]",
                                    step_, sampler.samples_consumed, sampler.shuffle_state,
                                    sampler.cursor, jitter_.state(), absl::StrJoin(texts, ",")));
}

std::vector<Windows> Trainer::NextMicroBatches() {
  const collectives::Segment mine =
      collectives::SegmentOf(options_.batch, partition_.layout().mesh.dp, partition_.at().dp);
  std::vector<Windows> micro_batches(micro_batch_count_);
  for (uint64_t i = 0; i < options_.batch; ++i) {
    const size_t window = sampler_.Next();
    if (i < mine.begin || i >= mine.begin + mine.count) continue;
    micro_batches[(i - mine.begin) / options_.micro_batch].push_back(corpus_.Window(window));
  }
  return micro_batches;
}

absl::Status Trainer::ForwardBackward(const std::vector<Windows>& micro_batches) {
  RETURN_IF_ERROR(data_parallel_->Weights(weights_));
  data_parallel_->Begin(sums_.gradients);
  sums_.loss = sums_.overflow_count = 0;
  return pipeline_->Run(weights_, micro_batches, sums_, [this](size_t micro_batch) {
    const bool is_last = micro_batch + 1 == micro_batch_count_;
    return is_last ? absl::OkStatus() : data_parallel_->MicroBatchDone(sums_.gradients);
  });
}

// The device computes as long as a real one would have since `began`; what the model really took is
// part of that.
absl::Status Trainer::WaitForDevice(Clock::time_point began) {
  const double longer = 1 + jitter_.Uniform() * options_.device_jitter_percent / 100;
  const FloatMilliseconds passed = Clock::now() - began;
  const double whole_ms = std::max(options_.device_ms * longer, passed.count()) * ComputeFactor();
  if (whole_ms <= passed.count()) return absl::OkStatus();
  return context_->device().Compute(absl::Milliseconds(whole_ms - passed.count())).Wait();
}

absl::Status Trainer::SumOverRanks() {
  metrics_ = {sums_.loss, sums_.overflow_count};
  const collectives::Handle metrics = metrics_ranks_->AllReduce(std::span(metrics_));
  const absl::Status reduced = data_parallel_->Reduce(sums_.gradients);
  // Both are waited for: an operation that goes on must not lose its buffer.
  const absl::Status summed = metrics.Wait();
  return reduced.ok() ? summed : reduced;
}

absl::Status Trainer::FlipBits(uint64_t step) {
  for (const BitFlip& flip : options_.bit_flips) {
    if (flip.rank != rank_ || flip.step != step) continue;
    const std::span<std::byte> element = state_.Find(flip.tensor, flip.state, flip.element);
    if (flip.bit >= 8 * element.size()) {
      return absl::InvalidArgumentError(
          absl::StrFormat("--flip-bit: rank %d has no bit %d of element %d of %s, state %s", rank_,
                          flip.bit, flip.element, flip.tensor, flip.state));
    }
    element[flip.bit / 8] ^= std::byte{1} << (flip.bit % 8);
    log_.Print(
        "bit_flipped",
        absl::StrFormat("\"step\":%d,\"tensor\":%s,\"state\":%s,\"element\":%d,\"bit\":%d", step,
                        JsonString(flip.tensor), JsonString(flip.state), flip.element, flip.bit));
  }
  return absl::OkStatus();
}

absl::Status Trainer::Step(uint64_t step) {
  hf_heartbeat(job(), step);
  BeginFaults(step);
  Phases phases;
  RETURN_IF_ERROR(Fetch());
  const uint64_t first_sample = sampler_.state().samples_consumed;
  std::vector<Windows> micro_batches;
  {
    const Section section(job(), "data");
    micro_batches = NextMicroBatches();
    SlowData();
  }
  phases.End("data");
  const Clock::time_point began = phases.began();
  RETURN_IF_ERROR(ForwardBackward(micro_batches));
  {
    const Section section(job(), "backward");
    RETURN_IF_ERROR(WaitForDevice(began));
  }
  phases.End("forward_backward");
  RETURN_IF_ERROR(ActBeforeReduction());
  RETURN_IF_ERROR(SumOverRanks());
  phases.End("allreduce");
  if (traffic_ != nullptr) {
    RETURN_IF_ERROR(traffic_->Run(step));
    phases.End("traffic");
  }
  // The optimizer changes what the last save may still be reading.
  if (checkpointing_ != nullptr) checkpointing_->WaitCaptured();
  phases.End("wait_captured");
  {
    const Section section(job(), "optimizer");
    RETURN_IF_ERROR(data_parallel_->Update(AdamConfig(), options_.batch));
  }
  state_.ballast.Stamp(static_cast<uint64_t>(state_.optimizer_step));
  RETURN_IF_ERROR(FlipBits(step));
  ActBehindStep();
  RETURN_IF_ERROR(Store());
  phases.End("optimizer");
  if (checkpointing_ != nullptr) {
    const bool due =
        options_.save_every > 0 ? step % options_.save_every == 0 : checkpointing_->Due(step);
    if (due) {
      const Section section(job(), "checkpoint");
      checkpointing_->Save(step, Blobs());
    }
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
