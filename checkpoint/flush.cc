#include "checkpoint/flush.h"

#include <deque>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/kill_point.h"

namespace holdfast {

std::string NumberedFileName(const std::string& path, uint32_t number) {
  if (number == 0) return path;
  const size_t slash = path.rfind('/');
  const size_t dot = path.rfind('.');
  const bool has_extension =
      dot != std::string::npos && (slash == std::string::npos || dot > slash);
  const size_t end = has_extension ? dot : path.size();
  return absl::StrCat(path.substr(0, end), ".r", number, path.substr(end));
}

void RemoveUnpublished(const ImageWorld& world, const std::string& path,
                       std::function<void()> done) {
  world.pool.Run(
      [&file_system = world.file_system, path] {
        // Dropped on purpose: it may not exist, and if it cannot be removed (read-only mount) it is
        // still a file that no manifest names.
        (void)file_system.Unlink(path);
      },
      std::move(done));
}

// Shared with the completions in flight, which keep file and memory alive when the flush is gone.
class ImageFlush::State : public std::enable_shared_from_this<State> {
 public:
  State(Image image, const std::string& path, uint32_t first_number, Listener& listener,
        const ImageWorld& world)
      : image_(std::move(image)),
        base_path_(path),
        number_(first_number),
        listener_(&listener),
        world_(world),
        is_ready_(image_.block_table.size()) {}

  void Begin() {
    if (is_forgotten_) return;
    if (is_abandoned()) {
      FinishAbandoning();
    } else {
      BeginTry();
    }
  }

  void BeginTry() {
    phase_ = Phase::kCreating;
    written_count_ = 0;
    queue_.clear();
    for (uint32_t block = 0; block < is_ready_.size(); ++block) {
      if (is_ready_[block]) queue_.push_back(block);
    }
    CreateNextName();
  }

  void BlockReady(uint32_t block) {
    CHECK(!is_ready_[block]);
    is_ready_[block] = true;
    queue_.push_back(block);
    if (phase_ == Phase::kWriting) WriteSome();
  }

  void Abandon(std::function<void()> done) {
    CHECK(done && !abandoned_);
    abandoned_ = std::move(done);
    listener_ = nullptr;
    if (phase_ == Phase::kDone) {
      world_.loop.Post([self = shared_from_this()] { self->FinishAbandoning(); });
    } else if (phase_ == Phase::kWriting) {
      EndTryIfIdle();
    }
    // Else the step that is under way ends the try.
  }

  void Forget() {
    listener_ = nullptr;
    is_forgotten_ = true;
    abandoned_ = nullptr;
  }

  uint32_t written_count() const { return written_count_; }

 private:
  enum class Phase { kCreating, kWriting, kSyncing, kRemoving, kDone };

  bool is_abandoned() const { return abandoned_ != nullptr; }

  void CreateNextName() {
    path_ = NumberedFileName(base_path_, number_);
    if (listener_ != nullptr) listener_->OnFileNamed(path_, number_);
    auto result =
        std::make_shared<absl::StatusOr<std::unique_ptr<IoFile>>>(absl::UnknownError("not run"));
    const uint64_t bytes = image_.block_table.size() * image_.block_bytes;
    world_.pool.Run(
        [result, path = path_, bytes, caching = world_.flush_caching,
         &file_system = world_.file_system] {
          *result = file_system.CreateSized(path, bytes, caching);
        },
        [self = shared_from_this(), result] { self->Created(std::move(*result)); });
  }

  void Created(absl::StatusOr<std::unique_ptr<IoFile>> file) {
    if (is_forgotten_) return;
    if (!file.ok() && absl::IsAlreadyExists(file.status()) && !is_abandoned() &&
        names_skipped_ < kFlushNamesSkippedMax) {
      ++names_skipped_;
      ++number_;
      CreateNextName();
      return;
    }
    if (file.ok()) {
      KillPoint("flush.file_created");
      file_ = std::move(*file);
    } else {
      try_status_ = file.status();
    }
    phase_ = Phase::kWriting;
    WriteSome();
    EndTryIfIdle();
  }

  bool IsTryOver() const { return is_forgotten_ || is_abandoned() || !try_status_.ok(); }

  void WriteSome() {
    while (!IsTryOver() && !queue_.empty() &&
           in_flight_count_ < world_.flush_writes_in_flight_max) {
      const uint32_t block = queue_.front();
      queue_.pop_front();
      if (!has_written_) begun_ = world_.clock.Elapsed();
      has_written_ = true;
      ++in_flight_count_;
      world_.ring.Write(*file_, block * image_.block_bytes,
                        image_.memory->bytes().subspan(
                            image_.block_table[block] * image_.block_bytes, image_.block_bytes),
                        [self = shared_from_this(), block](absl::Status status) {
                          self->Written(block, std::move(status));
                        });
    }
  }

  void Written(uint32_t block, absl::Status status) {
    --in_flight_count_;
    if (is_forgotten_) return;
    if (status.ok()) {
      KillPoint("flush.block_written");
      ++written_count_;
      // The listener may abandon the flush in this call.
      if (!IsTryOver()) listener_->OnBlockWritten(block);
    } else if (try_status_.ok()) {
      try_status_ = std::move(status);
    }
    WriteSome();
    if (IsTryOver()) {
      EndTryIfIdle();
    } else if (written_count_ == image_.block_table.size()) {
      Sync();
    }
  }

  void Sync() {
    KillPoint("flush.written");
    phase_ = Phase::kSyncing;
    world_.ring.Sync(*file_, [self = shared_from_this()](absl::Status status) {
      self->Synced(std::move(status));
    });
  }

  void Synced(absl::Status status) {
    if (is_forgotten_) return;
    phase_ = Phase::kWriting;
    if (!status.ok()) {
      try_status_ = std::move(status);
    } else {
      KillPoint("flush.synced");
    }
    if (IsTryOver()) {
      EndTryIfIdle();
      return;
    }
    phase_ = Phase::kDone;
    file_.reset();
    listener_->OnFlushed(path_, world_.clock.Elapsed() - begun_);
  }

  void EndTryIfIdle() {
    if (is_forgotten_ || phase_ != Phase::kWriting || !IsTryOver() || in_flight_count_ > 0) return;
    phase_ = Phase::kRemoving;
    // A name that existed before is not ours.
    if (absl::IsAlreadyExists(try_status_)) {
      world_.loop.Post([self = shared_from_this()] { self->Removed(); });
      return;
    }
    // Closed before it is removed, and there: closing may wait for the device.
    world_.pool.Run(
        [file = std::shared_ptr<IoFile>(std::move(file_)), path = path_,
         &file_system = world_.file_system]() mutable {
          file.reset();
          (void)file_system.Unlink(path);  // see RemoveUnpublished
        },
        [self = shared_from_this()] { self->Removed(); });
  }

  void Removed() {
    if (is_forgotten_) return;
    if (is_abandoned()) {
      FinishAbandoning();
      return;
    }
    errors_ += absl::StrCat(errors_.empty() ? "" : "; ", "try ", tries_ + 1, ": ",
                            std::string(try_status_.message()));
    const absl::Status why(try_status_.code(), errors_);
    try_status_ = absl::OkStatus();
    names_skipped_ = 0;
    if (++tries_ >= kFlushTriesMax) {
      phase_ = Phase::kDone;
      listener_->OnFlushFailed(why);
      return;
    }
    ++number_;
    listener_->OnRetry(why);
    // The listener may have abandoned or destroyed the flush.
    if (is_forgotten_) return;
    if (is_abandoned()) {
      FinishAbandoning();
      return;
    }
    BeginTry();
  }

  void FinishAbandoning() {
    if (is_forgotten_) return;
    phase_ = Phase::kDone;
    const std::function<void()> done = std::move(abandoned_);
    abandoned_ = nullptr;
    done();
  }

  const Image image_;
  const std::string base_path_;
  uint32_t number_;
  Listener* listener_;
  const ImageWorld world_;
  std::vector<bool> is_ready_;

  Phase phase_ = Phase::kCreating;
  std::function<void()> abandoned_;
  bool is_forgotten_ = false;  // the ImageFlush is gone
  int tries_ = 0;
  int names_skipped_ = 0;
  std::string errors_;

  // Of this try.
  std::string path_;
  std::unique_ptr<IoFile> file_;
  absl::Status try_status_;
  std::deque<uint32_t> queue_;
  uint32_t in_flight_count_ = 0;
  uint32_t written_count_ = 0;
  bool has_written_ = false;
  absl::Duration begun_;
};

std::unique_ptr<ImageFlush> ImageFlush::Start(Image image, const std::string& path,
                                              uint32_t first_number, Listener& listener,
                                              const ImageWorld& world) {
  auto state = std::make_shared<State>(std::move(image), path, first_number, listener, world);
  world.loop.Post([state] { state->Begin(); });
  return std::unique_ptr<ImageFlush>(new ImageFlush(std::move(state)));
}

ImageFlush::~ImageFlush() { state_->Forget(); }
void ImageFlush::BlockReady(uint32_t block) { state_->BlockReady(block); }
void ImageFlush::Abandon(std::function<void()> done) { state_->Abandon(std::move(done)); }
uint32_t ImageFlush::blocks_written() const { return state_->written_count(); }

}  // namespace holdfast
