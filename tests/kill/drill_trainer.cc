// A training process for drills: real hook library, tiny state, and every value of the state is a
// function of (step, global element), so that it can check a restored state bit for bit, also on
// another number of ranks.
//
//   drill_trainer ROOT JOB RANK WORLD_SIZE STEPS EVERY [MILLISECONDS_PER_STEP]
//
// It runs STEPS steps from where it restored, saves every EVERY-th, and prints one line per event:
//   opened <attempt>
//   restored <step> <attempt>   or   restored none
//   committed <step>            newest step known to survive power
//   reconnected <count>
//   trouble <what> <code> <text>        a call failed; training goes on
//   finished <step>             the last step is committed
// Exit code: 0 finished; 3 a restored value is wrong (printed); 1 anything else.
//
// HOLDFAST_DRILL makes it misbehave:
//   fork    forks during every capture, as data loaders do. Each child uses the job, which must be
//           refused, and overwrites its copy of the state; one of them lives to the end. Prints
//   forked <count> <of them, while blocks were still to be captured>
//   stop    stops itself behind the last save, while that waits for its comparison. Prints
//   stopping <step>
//   torn    its optimizer does not wait for the capture of the last save; then it kills itself
//   midway  kills itself in the middle of the capture of the last save, for which the fake driver
//           copies slowly. Prints
//   midway <blocks captured> <blocks>
//
// HOLDFAST_DRILL_GATE is a path: before its last step it waits until a file is there.
//
// With HOLDFAST_DRILL_DEVICE the state is in the memory of a CUDA device.
#include <dlfcn.h>
#include <signal.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "examples/cuda/device_buffers.h"
#include "holdfast.h"
#include "tests/support/fake_cuda/fake_cuda.h"

namespace {

constexpr uint64_t kShardedElements = 48 * 1024;  // uint32; divides by 1, 2, 3, 4
// In the drill `fork` the state is so many times as large, so that a capture takes a while.
constexpr uint64_t kForkScale = 64;
constexpr uint64_t kReplicatedElements = 5000;  // uint64
// Of every call that waits: long, because this process may wait for a processor, too.
constexpr int64_t kPatienceNs = 60'000'000'000;
// So slow that nobody misses the middle of a capture.
constexpr uint64_t kMidwayBytesPerSecond = 16 << 10;

uint64_t Mix(uint64_t step, uint64_t element) {
  uint64_t x = step * 0x9e3779b97f4a7c15u ^ element * 0xbf58476d1ce4e5b9u;
  x ^= x >> 29;
  x *= 0x94d049bb133111ebu;
  return x ^ (x >> 32);
}

struct State {
  uint64_t first = 0;  // global index of sharded[0]
  std::vector<uint32_t> sharded;
  std::vector<uint64_t> replicated;

  void Fill(uint64_t step) {
    for (uint64_t i = 0; i < sharded.size(); ++i) {
      sharded[i] = static_cast<uint32_t>(Mix(step, first + i));
    }
    for (uint64_t i = 0; i < replicated.size(); ++i) replicated[i] = Mix(step + 1, i);
  }
  bool Is(uint64_t step) const {
    State expected = *this;
    expected.Fill(step);
    return expected.sharded == sharded && expected.replicated == replicated;
  }
};

void Say(const std::string& line) {
  std::printf("%s\n", line.c_str());
  std::fflush(stdout);
}

// True if the call succeeded.
bool Check(const char* what, hf_code code, const hf_error& error) {
  if (code == HF_OK) return true;
  Say(std::string("trouble ") + what + " " + std::to_string(code) + " " + error.text);
  return false;
}

std::string LayoutDocument(uint64_t world_size, uint64_t sharded_elements) {
  return R"({"holdfast_layout": 1, "mesh": [{"axis": "dp", "size": )" + std::to_string(world_size) +
         R"(}],
 "tensors": [
  {"name": "sharded", "shape": [)" +
         std::to_string(sharded_elements) + R"(], "states": [{"state": "param", "dtype": "uint32",
    "place": [{"op": "shard", "dim": 0, "axis": "dp", "rule": "even"}]}]},
  {"name": "replicated", "shape": [)" +
         std::to_string(kReplicatedElements) +
         R"(], "states": [{"state": "param", "dtype": "uint64"}]}]})";
}

class Trainer {
 public:
  explicit Trainer(char** arguments)
      : rank_(std::atoi(arguments[3])),
        world_size_(std::atoi(arguments[4])),
        steps_(std::strtoull(arguments[5], nullptr, 10)),
        every_(std::strtoull(arguments[6], nullptr, 10)),
        drill_(std::getenv("HOLDFAST_DRILL") == nullptr ? "" : std::getenv("HOLDFAST_DRILL")) {
    options_.root = arguments[1];
    options_.job = arguments[2];
    options_.rank = rank_;
    options_.world_size = world_size_;
    options_.local_rank = rank_;
    if (drill_ == "fork") sharded_elements_ *= kForkScale;
    state_.sharded.resize(sharded_elements_ / static_cast<uint64_t>(world_size_));
    state_.first = state_.sharded.size() * static_cast<uint64_t>(rank_);
    state_.replicated.resize(kReplicatedElements);
  }
  ~Trainer() { hf_close(job_); }
  Trainer(const Trainer&) = delete;
  Trainer& operator=(const Trainer&) = delete;

  int Run(int64_t step_ms) {
    if (!Begin()) return 1;
    if (int failed = Restore(); failed != 0) return failed;
    const uint64_t last = step_ + steps_;
    while (step_ < last) {
      if (step_ + 1 == last) AwaitGate();
      // What the device would compute meanwhile.
      const timespec device = {step_ms / 1000, step_ms % 1000 * 1'000'000};
      nanosleep(&device, nullptr);
      Check("wait_captured", hf_wait_captured(job_, HF_ALL_GROUPS, kPatienceNs, &error_), error_);
      Change(++step_);
      const bool is_last_save = step_ == last / every_ * every_;
      if (is_last_save && (drill_ == "torn" || drill_ == "midway" || drill_ == "stop")) {
        AwaitCommit(step_ - every_);
      }
      if (drill_ == "midway" && is_last_save) SlowDownCopies();
      if (step_ % every_ == 0) Save();
      if (drill_ == "fork" && step_ % every_ == 0 && !Fork()) return 1;
      if (drill_ == "torn" && is_last_save) DieWithATornImage();
      if (drill_ == "midway" && is_last_save) DieMidway();
      if (drill_ == "stop" && is_last_save) {
        Say("stopping " + std::to_string(step_));
        raise(SIGSTOP);
      }
      Observe();
    }
    return Finish(last / every_ * every_);
  }

 private:
  bool Begin() {
    hf_error error;
    if (!Check("open", hf_open(&options_, &job_, &error), error)) return false;
    hf_info info = {};
    info.struct_bytes = sizeof(info);
    hf_get_info(job_, &info);
    Say("opened " + std::to_string(info.attempt));
    const std::span<std::byte> sharded = std::as_writable_bytes(std::span(state_.sharded));
    const std::span<std::byte> replicated = std::as_writable_bytes(std::span(state_.replicated));
    if (std::getenv("HOLDFAST_DRILL_DEVICE") != nullptr) {
      absl::StatusOr<std::unique_ptr<cuda::DeviceBuffers>> device =
          cuda::DeviceBuffers::Create({sharded, replicated}, static_cast<uint32_t>(rank_));
      if (!IsDone(device.status())) return false;
      device_ = *std::move(device);
      stream_ = device_->stream();
    }
    const hf_buffer buffers[] = {
        {"param/sharded", device_ ? device_->data(0) : sharded.data(), sharded.size(), 0},
        {"param/replicated", device_ ? device_->data(1) : replicated.data(), replicated.size(), 1}};
    const hf_blob_slot blobs[] = {{"loader", HF_BLOB_GLOBAL, 64}, {"rng", HF_BLOB_RANK, 64}};
    return Check(
        "register",
        hf_register(job_,
                    LayoutDocument(static_cast<uint64_t>(world_size_), sharded_elements_).c_str(),
                    buffers, 2, blobs, 2, kPatienceNs, &error),
        error);
  }

  static bool IsDone(const absl::Status& status) {
    if (!status.ok()) Say("trouble device " + status.ToString());
    return status.ok();
  }

  // The state of `step`, on its way to the device if it is there.
  void Change(uint64_t step) {
    state_.Fill(step);
    if (device_ != nullptr) IsDone(device_->Store());
  }

  int Restore() {
    hf_restore_options options = {};
    options.struct_bytes = sizeof(options);
    options.streams = &stream_;
    options.stream_count = 1;
    hf_restore_result result = {};
    result.struct_bytes = sizeof(result);
    const hf_code code = hf_restore_partial(job_, &options, &result, kPatienceNs, &error_);
    if (code == HF_NOT_FOUND) {
      Change(0);
      Say("restored none");
      return 0;
    }
    if (!Check("restore", code, error_)) return 1;
    step_ = result.step;
    Say("restored " + std::to_string(step_) + " " + std::to_string(result.attempt));
    if (device_ != nullptr && !IsDone(device_->Fetch())) return 1;
    if (!state_.Is(step_)) {
      Say("wrong tensors");
      return 3;
    }
    const void* data = nullptr;
    uint64_t bytes = 0;
    uint64_t value = 0;
    if (!Check("blob", hf_restored_blob(job_, "loader", -1, &data, &bytes, &error_), error_)) {
      return 3;
    }
    std::memcpy(&value, data, sizeof(value));
    if (bytes != 8 || value != Mix(step_, 7)) {
      Say("wrong loader blob");
      return 3;
    }
    for (uint32_t old_rank = 0; old_rank < result.world_size; ++old_rank) {
      if (!Check("blob", hf_restored_blob(job_, "rng", old_rank, &data, &bytes, &error_), error_)) {
        return 3;
      }
      std::memcpy(&value, data, sizeof(value));
      if (bytes != 8 || value != Mix(step_, 100 + old_rank)) {
        Say("wrong rng blob");
        return 3;
      }
    }
    return 0;
  }

  void Save() {
    const uint64_t loader = Mix(step_, 7);
    const uint64_t rng = Mix(step_, 100 + static_cast<uint64_t>(rank_));
    const hf_blob blobs[] = {{"loader", &loader, 8}, {"rng", &rng, 8}};
    hf_save_options options = {};
    options.struct_bytes = sizeof(options);
    options.blobs = blobs;
    options.blob_count = 2;
    options.streams = &stream_;
    options.stream_count = 1;
    options.wait_ns = kPatienceNs;
    Check("save", hf_save(job_, step_, &options, &error_), error_);
  }

  // Every call on the job is refused in a child, and nothing that it does is seen here.
  int UseJobInChild() {
    hf_error error;
    const uint64_t loader = 0;
    const hf_blob blob = {"loader", &loader, 8};
    hf_save_options options = {};
    options.struct_bytes = sizeof(options);
    options.blobs = &blob;
    options.blob_count = 1;
    hf_restore_result result = {};
    result.struct_bytes = sizeof(result);
    hf_save_report report = {};
    report.struct_bytes = sizeof(report);
    state_.Fill(step_ + 1000);
    if (hf_save(job_, step_ + 1, &options, &error) != HF_FAILED_PRECONDITION) return 11;
    if (hf_wait_captured(job_, HF_ALL_GROUPS, 0, &error) != HF_FAILED_PRECONDITION) return 12;
    if (hf_wait_committed(job_, step_, 0, 0, &error) != HF_FAILED_PRECONDITION) return 13;
    if (hf_restore(job_, &result, 0, &error) != HF_FAILED_PRECONDITION) return 14;
    if (hf_report(job_, step_, &report) != HF_FAILED_PRECONDITION) return 15;
    hf_heartbeat(job_, step_ + 1000);
    return hf_due(job_, step_) == 0 ? 0 : 16;
  }

  bool Fork() {
    const bool stays = forks_ == 0;
    int ends[2] = {-1, -1};
    if (stays && pipe(ends) != 0) return false;
    const pid_t child = fork();
    if (child < 0) return false;
    if (child == 0) {
      if (stays) {
        char byte = 0;
        close(ends[1]);
        // Until the parent is at its end; the capture has long been done then.
        if (read(ends[0], &byte, 1) != 0) _exit(17);
      }
      _exit(UseJobInChild());
    }
    hf_save_report report = {};
    report.struct_bytes = sizeof(report);
    if (hf_report(job_, step_, &report) != HF_OK) return false;
    ++forks_;
    if (report.blocks_captured < report.blocks) ++forks_under_capture_;
    if (stays) {
      close(ends[0]);
      staying_child_ = child;
      staying_child_pipe_ = ends[1];
      return true;
    }
    return ChildWasRefused(child);
  }

  static bool ChildWasRefused(pid_t child) {
    int status = 0;
    if (waitpid(child, &status, 0) != child) return false;
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return true;
    Say("trouble child " + std::to_string(status));
    return false;
  }

  // The ranks are not in step with one another: a death must not fail the save before, and who
  // counts what an agent takes along counts the last one only.
  void AwaitCommit(uint64_t step) {
    Check("wait_committed", hf_wait_committed(job_, step, HF_SURVIVE_POWER, kPatienceNs, &error_),
          error_);
  }

  // The bug that check_source finds, and a death before it can. (What is on a device is compared
  // by the copier, which may be quicker: then the save has failed.)
  void DieWithATornImage() {
    Change(step_ + 1);
    hf_save_report report = {};
    report.struct_bytes = sizeof(report);
    do {
      const timespec moment = {0, 100'000};
      nanosleep(&moment, nullptr);
    } while (hf_report(job_, step_, &report) == HF_OK && report.state != HF_SAVE_FAILED &&
             report.blocks_captured < report.blocks);
    Say("torn " + std::to_string(step_));
    raise(SIGKILL);
  }

  void SlowDownCopies() {
    // What is on its way to the device shall not be slow.
    if (device_ != nullptr) IsDone(device_->Fetch());
    void* const driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    const auto fake = reinterpret_cast<decltype(&fake_cuda)>(dlsym(driver, "fake_cuda"));
    if (fake == nullptr) {
      Say("trouble device no fake driver");
      std::exit(1);
    }
    fake()->SetCopyRate(kMidwayBytesPerSecond);
  }

  void DieMidway() {
    hf_save_report report = {};
    report.struct_bytes = sizeof(report);
    do {
      const timespec moment = {0, 100'000};
      nanosleep(&moment, nullptr);
    } while (hf_report(job_, step_, &report) == HF_OK && report.device_bytes == 0);
    Say("midway " + std::to_string(report.blocks_captured) + " " + std::to_string(report.blocks));
    raise(SIGKILL);
  }

  void AwaitGate() {
    const char* const gate = std::getenv("HOLDFAST_DRILL_GATE");
    if (gate == nullptr || *gate == '\0') return;
    while (access(gate, F_OK) != 0) {
      Observe();
      const timespec moment = {0, 2'000'000};
      nanosleep(&moment, nullptr);
    }
  }

  void Observe() {
    hf_info info = {};
    info.struct_bytes = sizeof(info);
    if (hf_get_info(job_, &info) != HF_OK) return;
    if (info.committed_power_step != UINT64_MAX && info.committed_power_step != committed_) {
      committed_ = info.committed_power_step;
      Say("committed " + std::to_string(committed_));
    }
    if (info.reconnect_count != reconnect_count_) {
      reconnect_count_ = info.reconnect_count;
      Say("reconnected " + std::to_string(reconnect_count_));
    }
  }

  int Finish(uint64_t last_saved) {
    Check("wait_captured", hf_wait_captured(job_, HF_ALL_GROUPS, kPatienceNs, &error_), error_);
    const bool committed =
        Check("wait_committed",
              hf_wait_committed(job_, last_saved, HF_SURVIVE_POWER, kPatienceNs, &error_), error_);
    Observe();
    if (!committed) return 1;
    if (forks_ > 0) {
      close(staying_child_pipe_);
      if (!ChildWasRefused(staying_child_)) return 1;
      Say("forked " + std::to_string(forks_) + " " + std::to_string(forks_under_capture_));
    }
    Say("committed " + std::to_string(last_saved));
    Say("finished " + std::to_string(last_saved));
    return 0;
  }

  const int rank_;
  const int world_size_;
  const uint64_t steps_;
  const uint64_t every_;
  const std::string_view drill_;
  hf_open_options options_ = HF_OPEN_OPTIONS_INIT;
  hf_job* job_ = nullptr;
  hf_error error_ = {};
  State state_;
  std::unique_ptr<cuda::DeviceBuffers> device_;  // or null: the state is in host memory
  void* stream_ = nullptr;                       // its, or null
  uint64_t step_ = 0;
  uint64_t committed_ = UINT64_MAX;
  uint32_t reconnect_count_ = 0;
  uint64_t sharded_elements_ = kShardedElements;
  uint64_t forks_ = 0;
  uint64_t forks_under_capture_ = 0;
  pid_t staying_child_ = -1;
  int staying_child_pipe_ = -1;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 7) {
    std::fprintf(stderr, "usage: drill_trainer ROOT JOB RANK WORLD_SIZE STEPS EVERY [MS]\n");
    return 2;
  }
  return Trainer(argv).Run(argc > 7 ? std::atoi(argv[7]) : 0);
}
