#include "tests/support/sim_disk.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "io/errno_status.h"

namespace holdfast {
namespace {

constexpr size_t kNameBytesMax = 255;
constexpr const char* kNoPower = "the power was cut";

std::string_view Text(std::span<const std::byte> data) {
  return {reinterpret_cast<const char*>(data.data()), data.size()};
}

absl::Status NoPower(const char* verb, const std::string& path) {
  return absl::UnavailableError(absl::StrFormat("%s %s: %s", verb, path, kNoPower));
}

}  // namespace

// Knows its node by a handle, so that it is dead after a reboot.
class SimDisk::Writable final : public WritableFile {
 public:
  Writable(SimDisk& disk, std::string path, int handle)
      : disk_(disk), path_(std::move(path)), handle_(handle) {}
  ~Writable() override { disk_.Close(handle_); }

  absl::Status Append(std::span<const std::byte> data) override {
    RETURN_IF_ERROR(CheckUsable("append to"));
    const uint64_t node = disk_.open_files_.at(handle_).node;
    absl::Status status = disk_.Begin(Operation::kAppend, "append to", path_);
    if (status.ok()) {
      status = disk_.AppendTo(node, data);
    } else if (!disk_.power_was_cut_ && !disk_.read_only_) {
      disk_.state_.Write(node, disk_.state_.node(node).visible.size(),
                         Text(data.first(data.size() / 2)));
    }
    failed_ = !status.ok();
    return status;
  }

  absl::Status Sync() override {
    RETURN_IF_ERROR(CheckUsable("sync"));
    const absl::Status status = disk_.SyncNode(
        Operation::kSyncFile, disk_.open_files_.at(handle_).node, disk_.state_.last_sequence());
    failed_ = !status.ok();
    return status;
  }

 private:
  absl::Status CheckUsable(const char* verb) const {
    if (failed_) {
      return absl::FailedPreconditionError(
          absl::StrFormat("%s %s: an earlier call on this file failed", verb, path_));
    }
    if (!disk_.open_files_.contains(handle_)) return NoPower(verb, path_);
    return absl::OkStatus();
  }

  SimDisk& disk_;
  const std::string path_;
  const int handle_;
  bool failed_ = false;
};

class SimDisk::Opened final : public IoFile {
 public:
  Opened(SimDisk& disk, int handle, uint64_t size_bytes)
      : disk_(disk), handle_(handle), size_bytes_(size_bytes) {}
  ~Opened() override {
    for (const RingOperation& operation : disk_.in_flight_) CHECK(operation.handle != handle_);
    disk_.Close(handle_);
  }
  int handle() const override { return handle_; }
  uint64_t size_bytes() const override { return size_bytes_; }

 private:
  SimDisk& disk_;
  const int handle_;
  const uint64_t size_bytes_;
};

SimDisk::SimDisk(const Options& options)
    : options_(options), state_(options.sector_bytes, options.stale_byte), random_(options.seed) {}

SimDisk::~SimDisk() { AbandonInFlight(InFlight::kAll); }

uint64_t SimDisk::Random() {  // splitmix64
  uint64_t z = (random_ += 0x9E3779B97F4A7C15u);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

// --- power ---

void SimDisk::CutPowerAfter(uint64_t operation_count) {
  CHECK(!power_was_cut_);
  cut_after_ = operation_count;
}

void SimDisk::CutPowerNow() {
  if (power_was_cut_) return;
  power_was_cut_ = true;
  for (const RingOperation& operation : in_flight_) {
    const auto file = open_files_.find(operation.handle);
    if (operation.operation != Operation::kRingWrite || file == open_files_.end()) continue;
    state_.WriteInFlight(file->second.node, operation.offset_bytes, Text(operation.source));
  }
}

std::vector<Survivors> SimDisk::LegalSurvivors(const SimDiskState::Enumeration& enumeration) const {
  CHECK(power_was_cut_);
  return state_.LegalSurvivors(enumeration);
}

void SimDisk::Reboot(const Survivors& survivors) {
  CutPowerNow();
  state_ = state_.Rebooted(survivors);
  open_files_.clear();
  in_flight_.clear();
  faults_.clear();
  cut_after_.reset();
  power_was_cut_ = false;
}

std::unique_ptr<SimDisk> SimDisk::RebootedCopy(const Survivors& survivors) const {
  CHECK(power_was_cut_);
  auto copy = std::make_unique<SimDisk>(options_);
  copy->state_ = state_.Rebooted(survivors);
  copy->read_only_ = read_only_;
  return copy;
}

void SimDisk::AbandonInFlight(InFlight carried_out) {
  std::vector<RingOperation> operations = std::move(in_flight_);
  in_flight_.clear();
  if (carried_out == InFlight::kNone) return;
  for (const RingOperation& operation : operations) {
    Carry(operation).IgnoreError();  // nobody is left to be told
  }
}

// --- faults ---

void SimDisk::FailOperation(Operation operation, uint64_t index, absl::Status status,
                            std::string path_part) {
  CHECK(!status.ok());
  faults_.push_back({operation, index, false, std::move(status), std::move(path_part)});
}

void SimDisk::FailOperationsFrom(Operation operation, uint64_t index, absl::Status status,
                                 std::string path_part) {
  CHECK(!status.ok());
  faults_.push_back({operation, index, true, std::move(status), std::move(path_part)});
}

bool SimDisk::Mutates(Operation operation) {
  switch (operation) {
    case Operation::kCreateNew:
    case Operation::kAppend:
    case Operation::kSyncFile:
    case Operation::kCreateSized:
    case Operation::kLink:
    case Operation::kUnlink:
    case Operation::kCreateDirectory:
    case Operation::kSyncDirectory:
    case Operation::kRingWrite:
    case Operation::kRingSync:
      return true;
    case Operation::kOpenForRead:
    case Operation::kReadSmallFile:
    case Operation::kList:
    case Operation::kStat:
    case Operation::kSpaceOf:
    case Operation::kRingRead:
      return false;
  }
  CHECK(false);
}

absl::Status SimDisk::Begin(Operation operation, const char* verb, const std::string& path) {
  const bool mutates = Mutates(operation);
  if (mutates && !power_was_cut_) {
    if (cut_after_ == 0u) {
      CutPowerNow();
    } else {
      ++mutating_count_;
      if (cut_after_.has_value()) --*cut_after_;
    }
  }
  if (power_was_cut_) return NoPower(verb, path);
  absl::Status status;
  for (Fault& fault : faults_) {
    if (fault.operation != operation || path.find(fault.path_part) == std::string::npos) continue;
    if (fault.countdown == 0 && status.ok()) {
      ++fault_count_;
      status = absl::Status(fault.status.code(),
                            absl::StrCat(verb, " ", path, ": ", fault.status.message()));
    }
    if (fault.countdown > 0 || !fault.repeats) --fault.countdown;  // past 0: never again
  }
  RETURN_IF_ERROR(status);
  const bool syncs = operation == Operation::kSyncFile || operation == Operation::kRingSync ||
                     operation == Operation::kSyncDirectory;
  if (read_only_ && mutates && !syncs) return ErrnoStatus(EROFS, verb, path);
  return absl::OkStatus();
}

// --- reaching in ---

void SimDisk::FlipBit(const std::string& path, uint64_t offset_bytes, int bit) {
  SimDiskState::Node& node = state_.node(state_.Find(path));
  CHECK(!node.is_directory && offset_bytes < node.visible.size() && bit >= 0 && bit < 8);
  node.visible[offset_bytes] = static_cast<char>(node.visible[offset_bytes] ^ (1 << bit));
  node.durable = node.visible;
}

void SimDisk::TruncateFile(const std::string& path, uint64_t size_bytes) {
  SimDiskState::Node& node = state_.node(state_.Find(path));
  CHECK(!node.is_directory && size_bytes <= node.visible.size());
  node.visible.resize(size_bytes);
  node.durable = node.visible;
}

void SimDisk::PutFile(const std::string& path, std::string bytes) {
  CHECK(path.size() > 1 && path[0] == '/');
  uint64_t directory = SimDiskState::kRoot;
  size_t begin = 1;
  for (size_t end = path.find('/', begin); end != std::string::npos; end = path.find('/', begin)) {
    const std::string name = path.substr(begin, end - begin);
    begin = end + 1;
    if (!state_.node(directory).names.contains(name)) {
      const uint64_t made = state_.NewDirectory();
      state_.SetName(directory, name, made);
      state_.Sync(directory, state_.last_sequence());
    }
    directory = state_.node(directory).names.at(name);
    CHECK(state_.node(directory).is_directory);
  }
  uint64_t file = state_.Find(path);
  if (file == 0) {
    file = state_.NewFile();
    state_.SetName(directory, path.substr(begin), file);
    state_.Sync(directory, state_.last_sequence());
  }
  CHECK(!state_.node(file).is_directory);
  state_.node(file).durable = bytes;
  state_.node(file).visible = std::move(bytes);
}

void SimDisk::RemoveFile(const std::string& path) {
  const absl::StatusOr<Place> place = Lookup("remove", path);
  CHECK_OK(place.status());
  CHECK(place->node != 0);
  state_.RemoveName(place->directory, place->name);
  state_.Sync(place->directory, state_.last_sequence());
}

absl::StatusOr<std::string> SimDisk::Contents(const std::string& path) const {
  ASSIGN_OR_RETURN(const uint64_t node, FindFile("read", path));
  return state_.node(node).visible;
}

std::vector<std::string> SimDisk::AllFiles() const {
  std::vector<std::string> files;
  std::vector<std::pair<std::string, uint64_t>> to_visit = {{"", SimDiskState::kRoot}};
  while (!to_visit.empty()) {
    const auto [path, id] = to_visit.back();
    to_visit.pop_back();
    for (const auto& [name, child] : state_.node(id).names) {
      const std::string child_path = absl::StrCat(path, "/", name);
      if (state_.node(child).is_directory) {
        to_visit.emplace_back(child_path, child);
      } else {
        files.push_back(child_path);
      }
    }
  }
  std::sort(files.begin(), files.end());
  return files;
}

// --- FileSystem ---

absl::StatusOr<SimDisk::Place> SimDisk::Lookup(const char* verb, const std::string& path) const {
  const size_t slash = path.rfind('/');
  if (path.empty() || path[0] != '/' || slash + 1 == path.size()) {
    return absl::InvalidArgumentError(
        absl::StrFormat("%s %s: the simulated disk takes absolute paths to a name", verb, path));
  }
  Place place;
  place.name = path.substr(slash + 1);
  if (place.name.size() > kNameBytesMax) return ErrnoStatus(ENAMETOOLONG, verb, path);
  place.directory = state_.Find(std::string_view(path).substr(0, slash));
  if (place.directory == 0) return ErrnoStatus(ENOENT, verb, path);
  if (!state_.node(place.directory).is_directory) return ErrnoStatus(ENOTDIR, verb, path);
  const auto& names = state_.node(place.directory).names;
  if (const auto entry = names.find(place.name); entry != names.end()) place.node = entry->second;
  return place;
}

absl::StatusOr<uint64_t> SimDisk::FindFile(const char* verb, const std::string& path) const {
  const uint64_t node = state_.Find(path);
  if (node == 0) return ErrnoStatus(ENOENT, verb, path);
  if (state_.node(node).is_directory) return ErrnoStatus(EISDIR, verb, path);
  return node;
}

absl::StatusOr<uint64_t> SimDisk::FindDirectory(const char* verb, const std::string& path) const {
  const uint64_t node = state_.Find(path);
  if (node == 0) return ErrnoStatus(ENOENT, verb, path);
  if (!state_.node(node).is_directory) return ErrnoStatus(ENOTDIR, verb, path);
  return node;
}

uint64_t SimDisk::FreeBytes() const {
  return options_.capacity_bytes - std::min(options_.capacity_bytes, state_.UsedBytes());
}

int SimDisk::Open(uint64_t node, Caching caching, bool writable) {
  ++state_.node(node).open_count;
  open_files_[next_handle_] = {node, caching, writable};
  return next_handle_++;
}

void SimDisk::Close(int handle) {
  const auto file = open_files_.find(handle);
  if (file == open_files_.end()) return;  // of before a reboot
  --state_.node(file->second.node).open_count;
  open_files_.erase(file);
}

absl::StatusOr<std::unique_ptr<WritableFile>> SimDisk::CreateNew(const std::string& path) {
  RETURN_IF_ERROR(Begin(Operation::kCreateNew, "create", path));
  ASSIGN_OR_RETURN(const Place place, Lookup("create", path));
  if (place.node != 0) return ErrnoStatus(EEXIST, "create", path);
  const uint64_t node = state_.NewFile();
  state_.SetName(place.directory, place.name, node);
  return std::make_unique<Writable>(*this, path, Open(node, Caching::kBuffered, true));
}

absl::Status SimDisk::AppendTo(uint64_t node, std::span<const std::byte> data) {
  const uint64_t size = state_.node(node).visible.size();
  const uint64_t sector = options_.sector_bytes;
  const uint64_t room = FreeBytes() / sector * sector + (sector - size % sector) % sector;
  const std::string_view fits = Text(data).substr(0, room);
  state_.Write(node, size, fits);
  if (fits.size() == data.size()) return absl::OkStatus();
  return ErrnoStatus(ENOSPC, "append to", state_.PathOf(node));
}

absl::Status SimDisk::SyncNode(Operation operation, uint64_t node, uint64_t sequence) {
  const absl::Status status = Begin(operation, "sync", state_.PathOf(node));
  if (status.ok()) {
    state_.Sync(node, sequence);
  } else if (!power_was_cut_) {
    state_.LoseUnsynced(node, sequence);
  }
  return status;
}

absl::StatusOr<std::unique_ptr<IoFile>> SimDisk::CreateSized(const std::string& path,
                                                             uint64_t size_bytes, Caching caching) {
  RETURN_IF_ERROR(Begin(Operation::kCreateSized, "create", path));
  ASSIGN_OR_RETURN(const Place place, Lookup("create", path));
  if (place.node != 0) return ErrnoStatus(EEXIST, "create", path);
  if (caching == Caching::kDirect && !options_.direct_supported) {
    return ErrnoStatus(EINVAL, "create", path);
  }
  if (size_bytes > FreeBytes()) return ErrnoStatus(ENOSPC, "allocate", path);
  const uint64_t node = state_.NewFile();
  state_.SetName(place.directory, place.name, node);
  state_.Extend(node, size_bytes);
  return std::make_unique<Opened>(*this, Open(node, caching, true), size_bytes);
}

absl::StatusOr<std::unique_ptr<IoFile>> SimDisk::OpenForRead(const std::string& path,
                                                             Caching caching) {
  RETURN_IF_ERROR(Begin(Operation::kOpenForRead, "open", path));
  ASSIGN_OR_RETURN(const uint64_t node, FindFile("open", path));
  if (caching == Caching::kDirect && !options_.direct_supported) {
    return ErrnoStatus(EINVAL, "open", path);
  }
  const uint64_t size_bytes = state_.node(node).visible.size();
  return std::make_unique<Opened>(*this, Open(node, caching, false), size_bytes);
}

absl::StatusOr<std::string> SimDisk::ReadSmallFile(const std::string& path, uint64_t bytes_max) {
  RETURN_IF_ERROR(Begin(Operation::kReadSmallFile, "read", path));
  ASSIGN_OR_RETURN(const uint64_t node, FindFile("read", path));
  const std::string& bytes = state_.node(node).visible;
  if (bytes.size() > bytes_max) {
    return absl::ResourceExhaustedError(absl::StrFormat(
        "read %s: the file has %d bytes, at most %d are allowed", path, bytes.size(), bytes_max));
  }
  return bytes;
}

absl::Status SimDisk::Link(const std::string& from, const std::string& to) {
  RETURN_IF_ERROR(Begin(Operation::kLink, "link", to));
  if (!options_.links_supported) return ErrnoStatus(EOPNOTSUPP, "link", to);
  ASSIGN_OR_RETURN(const uint64_t node, FindFile("link", from));
  ASSIGN_OR_RETURN(const Place place, Lookup("link", to));
  if (place.node != 0) return ErrnoStatus(EEXIST, "link", to);
  state_.SetName(place.directory, place.name, node);
  return absl::OkStatus();
}

absl::Status SimDisk::Unlink(const std::string& path) {
  RETURN_IF_ERROR(Begin(Operation::kUnlink, "unlink", path));
  ASSIGN_OR_RETURN(const Place place, Lookup("unlink", path));
  if (place.node == 0) return ErrnoStatus(ENOENT, "unlink", path);
  if (state_.node(place.node).is_directory) return ErrnoStatus(EISDIR, "unlink", path);
  state_.RemoveName(place.directory, place.name);
  return absl::OkStatus();
}

absl::Status SimDisk::CreateDirectory(const std::string& path) {
  RETURN_IF_ERROR(Begin(Operation::kCreateDirectory, "create directory", path));
  ASSIGN_OR_RETURN(const Place place, Lookup("create directory", path));
  if (place.node != 0) return ErrnoStatus(EEXIST, "create directory", path);
  state_.SetName(place.directory, place.name, state_.NewDirectory());
  return absl::OkStatus();
}

absl::Status SimDisk::SyncFile(const std::string& path) {
  const absl::StatusOr<uint64_t> node = FindFile("sync", path);
  if (!node.ok()) {
    RETURN_IF_ERROR(Begin(Operation::kSyncFile, "sync", path));
    return node.status();
  }
  return SyncNode(Operation::kSyncFile, *node, state_.last_sequence());
}

absl::Status SimDisk::SyncDirectory(const std::string& path) {
  const absl::StatusOr<uint64_t> node = FindDirectory("sync directory", path);
  if (!node.ok()) {
    RETURN_IF_ERROR(Begin(Operation::kSyncDirectory, "sync directory", path));
    return node.status();
  }
  return SyncNode(Operation::kSyncDirectory, *node, state_.last_sequence());
}

absl::StatusOr<std::vector<std::string>> SimDisk::List(const std::string& path, size_t count_max) {
  RETURN_IF_ERROR(Begin(Operation::kList, "list", path));
  ASSIGN_OR_RETURN(const uint64_t node, FindDirectory("list", path));
  std::vector<std::string> names;
  for (const auto& [name, child] : state_.node(node).names) names.push_back(name);
  if (names.size() > count_max) {
    return absl::ResourceExhaustedError(
        absl::StrFormat("list %s: more than the %d names that are allowed", path, count_max));
  }
  return names;
}

absl::StatusOr<FileInfo> SimDisk::Stat(const std::string& path) {
  RETURN_IF_ERROR(Begin(Operation::kStat, "stat", path));
  const uint64_t id = state_.Find(path);
  if (id == 0) return ErrnoStatus(ENOENT, "stat", path);
  const SimDiskState::Node& node = state_.node(id);
  FileInfo info;
  info.kind = node.is_directory ? FileInfo::Kind::kDirectory : FileInfo::Kind::kFile;
  info.size_bytes = node.visible.size();
  const uint64_t sector = options_.sector_bytes;
  info.allocated_bytes = (info.size_bytes + sector - 1) / sector * sector;
  return info;
}

absl::StatusOr<Space> SimDisk::SpaceOf(const std::string& path) {
  RETURN_IF_ERROR(Begin(Operation::kSpaceOf, "space of", path));
  if (state_.Find(path) == 0) return ErrnoStatus(ENOENT, "space of", path);
  return Space{.total_bytes = options_.capacity_bytes, .available_bytes = FreeBytes()};
}

// --- IoRing ---

void SimDisk::Submit(IoFile& file, RingOperation operation) {
  operation.handle = file.handle();
  in_flight_.push_back(std::move(operation));
}

void SimDisk::Write(IoFile& file, uint64_t offset_bytes, std::span<const std::byte> data,
                    Done done) {
  Submit(file, {.operation = Operation::kRingWrite,
                .offset_bytes = offset_bytes,
                .source = data,
                .done = std::move(done)});
}

void SimDisk::Read(IoFile& file, uint64_t offset_bytes, std::span<std::byte> data, Done done) {
  Submit(file, {.operation = Operation::kRingRead,
                .offset_bytes = offset_bytes,
                .target = data,
                .done = std::move(done)});
}

void SimDisk::Sync(IoFile& file, Done done) {
  Submit(file, {.operation = Operation::kRingSync,
                .sequence = state_.last_sequence(),
                .done = std::move(done)});
}

bool SimDisk::RegisterMemory(std::span<std::byte> /*memory*/) { return false; }
void SimDisk::UnregisterMemory(std::span<std::byte> /*memory*/) {}

void SimDisk::RunCompletions() {
  size_t count = in_flight_.size();
  if (options_.seed != 0 && count > 0) count = 1 + Random() % count;
  for (; count > 0 && !in_flight_.empty(); --count) {
    const size_t index = options_.seed == 0 ? 0 : Random() % in_flight_.size();
    // It stays in flight while it is carried out: if the power is cut at this very operation, its
    // bytes are among those that may have reached the disk.
    const absl::Status status = Carry(in_flight_[index]);
    const Done done = std::move(in_flight_[index].done);
    in_flight_.erase(in_flight_.begin() + static_cast<std::ptrdiff_t>(index));
    done(status);
  }
}

absl::Status SimDisk::Carry(const RingOperation& operation) {
  const auto file = open_files_.find(operation.handle);
  if (file == open_files_.end()) return NoPower("use", "a file that was open before");
  if (operation.operation == Operation::kRingSync) {
    return SyncNode(Operation::kRingSync, file->second.node, operation.sequence);
  }
  return CarryTransfer(operation, file->second);
}

absl::Status SimDisk::CarryTransfer(const RingOperation& operation, const OpenFile& file) {
  const bool writes = operation.operation == Operation::kRingWrite;
  const char* verb = writes ? "write" : "read";
  const std::string path = state_.PathOf(file.node);
  const absl::Status begun = Begin(operation.operation, verb, path);
  if (!begun.ok()) {
    if (writes && !power_was_cut_ && !read_only_) {
      state_.Write(file.node, operation.offset_bytes,
                   Text(operation.source.first(operation.source.size() / 2)));
    }
    return begun;
  }
  const size_t length = writes ? operation.source.size() : operation.target.size();
  const void* memory = writes ? operation.source.data() : operation.target.data();
  const uint64_t alignment = options_.direct_alignment_bytes;
  if (file.caching == Caching::kDirect &&
      (operation.offset_bytes % alignment != 0 || length % alignment != 0 ||
       reinterpret_cast<uintptr_t>(memory) % alignment != 0)) {
    return ErrnoStatus(EINVAL, verb, path);
  }
  return writes ? WriteNode(operation, file) : ReadNode(operation, file);
}

absl::Status SimDisk::WriteNode(const RingOperation& operation, const OpenFile& file) {
  const std::string path = state_.PathOf(file.node);
  if (!file.writable) return ErrnoStatus(EBADF, "write", path);
  const uint64_t end = operation.offset_bytes + operation.source.size();
  const uint64_t size = state_.node(file.node).visible.size();
  if (end > size && end - size > FreeBytes()) return ErrnoStatus(ENOSPC, "write", path);
  state_.Write(file.node, operation.offset_bytes, Text(operation.source));
  return absl::OkStatus();
}

absl::Status SimDisk::ReadNode(const RingOperation& operation, const OpenFile& file) const {
  const std::string& bytes = state_.node(file.node).visible;
  const uint64_t begin = std::min<uint64_t>(operation.offset_bytes, bytes.size());
  const uint64_t found = std::min<uint64_t>(bytes.size() - begin, operation.target.size());
  if (found > 0) std::memcpy(operation.target.data(), bytes.data() + begin, found);
  if (found == operation.target.size()) return absl::OkStatus();
  return absl::DataLossError(absl::StrFormat(
      "read %s: truncated: expected %d bytes at offset %d, found %d", state_.PathOf(file.node),
      operation.target.size(), operation.offset_bytes, found));
}

std::function<absl::Status(IoFile& file, uint64_t offset, std::span<std::byte> out)> SimReadAt(
    SimDisk& disk) {
  return [&disk](IoFile& file, uint64_t offset, std::span<std::byte> out) {
    absl::Status result = absl::UnknownError("not read");
    disk.Read(file, offset, out, [&result](absl::Status status) { result = std::move(status); });
    while (disk.in_flight_count() > 0) disk.RunCompletions();
    return result;
  };
}

}  // namespace holdfast
