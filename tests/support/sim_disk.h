// A disk that loses what was not synced: FileSystem and IoRing over one deterministic
// single-threaded model, for enumerating every crash state of a protocol.
//
// Model.
//   Data: the unsynced changes of a file are a list of writes and size changes. WritableFile::Sync
//     and IoRing::Sync make durable what had completed before they were called; a ring's sync
//     covers nothing that was in flight then. Sectors (Options::sector_bytes) are written whole; a
//     write of several can be torn after any of them. Bytes that were allocated and never written,
//     or whose write was lost, read as Options::stale_byte.
//   Names: created, linked and removed names are changes of their DIRECTORY, durable after
//     SyncDirectory of it. A file's Sync says nothing of its name, a directory's own name is a
//     change of its parent. A name may survive without the data and the other way round.
//   Power cut: the operation that meets it and all later ones fail with kUnavailable and change
//     nothing; what the ring had in flight may or may not have reached the disk (it joins the
//     unsynced changes, last). Reboot() keeps what a choice of Survivors says, and forgets every
//     open file.
//   Failed sync: fails, and what it should have made durable never becomes so, though readers see
//     it until the reboot (the kernel marks such pages clean).
//   Ring: operations take effect one after another when RunCompletions() gets to them, in an order
//     of the seed's choice, several per call; seed 0 is the order of submission, all at once.
//   Direct files: offsets, lengths and addresses that are no multiple of
//     Options::direct_alignment_bytes are refused as the kernel does.
// Not modelled: arbitrary subsets of the unsynced changes (LegalSurvivors lists a chosen family);
//   write-back on its own before a crash other than through survivors; ext4's habit of syncing a
//   new file's name with its data; access rights; symbolic links; holes.
#ifndef HOLDFAST_TESTS_SUPPORT_SIM_DISK_H_
#define HOLDFAST_TESTS_SUPPORT_SIM_DISK_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "io/file_system.h"
#include "io/io_ring.h"
#include "tests/support/sim_disk_state.h"

namespace holdfast {

// Threads: one. Lifetime: outlives the files it opened.
class SimDisk final : public FileSystem, public IoRing {
 public:
  struct Options {
    uint64_t sector_bytes = 512;
    char stale_byte = '\xDB';
    uint64_t direct_alignment_bytes = 512;
    bool direct_supported = true;  // else kDirect is kInvalidArgument
    bool links_supported = true;   // else Link is kUnimplemented
    uint64_t capacity_bytes = uint64_t{1} << 40;
    uint64_t seed = 0;  // order of ring completions
  };
  enum class Operation {
    kCreateNew,
    kAppend,
    kSyncFile,  // WritableFile::Sync
    kCreateSized,
    kOpenForRead,
    kReadSmallFile,
    kLink,
    kUnlink,
    kCreateDirectory,
    kSyncDirectory,
    kList,
    kStat,
    kSpaceOf,
    kRingWrite,
    kRingRead,
    kRingSync,
  };

  SimDisk() : SimDisk(Options()) {}
  explicit SimDisk(const Options& options);
  ~SimDisk() override;
  SimDisk(const SimDisk&) = delete;
  SimDisk& operator=(const SimDisk&) = delete;

  // --- power ---
  // After `operation_count` more mutating operations (creating, appending, writing, syncing,
  // linking, removing; successful or not) the power is cut, at the next of them.
  void CutPowerAfter(uint64_t operation_count);
  void CutPowerNow();
  bool power_was_cut() const { return power_was_cut_; }
  // Mutating operations so far, the one that met the cut not included.
  uint64_t mutating_operation_count() const { return mutating_count_; }

  // Of the present state. The power must have been cut.
  std::vector<Survivors> LegalSurvivors(const SimDiskState::Enumeration& enumeration = {}) const;
  // This disk after the power came back. Open files are dead (kUnavailable), planned faults and
  // pending operations are gone. Cuts the power first if it is on.
  void Reboot(const Survivors& survivors);
  // The same as a disk of its own, so that many choices are tried on one state. The power must have
  // been cut.
  std::unique_ptr<SimDisk> RebootedCopy(const Survivors& survivors) const;

  // For a process that dies while the machine lives: what the ring has in flight is carried out (or
  // not, if `carried_out` is kNone) and its completions are dropped. Files stay open.
  enum class InFlight { kAll, kNone };
  void AbandonInFlight(InFlight carried_out);

  // --- faults ---
  // The `index`-th operation of this kind from now on (0: the next) on a path that contains
  // `path_part` fails with `status` and has no effect, but: a failed append or ring write leaves
  // the first half of its bytes behind, a failed sync loses what it should have synced.
  void FailOperation(Operation operation, uint64_t index, absl::Status status,
                     std::string path_part = "");
  // The same for it and all later ones, until ClearFaults().
  void FailOperationsFrom(Operation operation, uint64_t index, absl::Status status,
                          std::string path_part = "");
  void ClearFaults() { faults_.clear(); }
  uint64_t fault_count() const { return fault_count_; }  // faults that have happened

  void SetReadOnly(bool read_only) { read_only_ = read_only; }
  void SetCapacity(uint64_t capacity_bytes) { options_.capacity_bytes = capacity_bytes; }
  void SetDirectSupported(bool supported) { options_.direct_supported = supported; }

  // --- reaching in, at once visible and durable, no operation ---
  void FlipBit(const std::string& path, uint64_t offset_bytes, int bit);
  void TruncateFile(const std::string& path, uint64_t size_bytes);
  void PutFile(const std::string& path, std::string bytes);  // creates missing directories
  void RemoveFile(const std::string& path);
  absl::StatusOr<std::string> Contents(const std::string& path) const;  // what a reader sees
  std::vector<std::string> AllFiles() const;                            // paths, sorted
  uint64_t used_bytes() const { return state_.UsedBytes(); }
  std::vector<std::string> DescribeUnsynced() const { return state_.DescribeItems(); }

  // --- FileSystem ---
  absl::StatusOr<std::unique_ptr<WritableFile>> CreateNew(const std::string& path) override;
  absl::StatusOr<std::unique_ptr<IoFile>> CreateSized(const std::string& path, uint64_t size_bytes,
                                                      Caching caching) override;
  absl::StatusOr<std::unique_ptr<IoFile>> OpenForRead(const std::string& path,
                                                      Caching caching) override;
  absl::StatusOr<std::string> ReadSmallFile(const std::string& path, uint64_t bytes_max) override;
  absl::Status Link(const std::string& from, const std::string& to) override;
  absl::Status SyncFile(const std::string& path) override;
  absl::Status Unlink(const std::string& path) override;
  absl::Status CreateDirectory(const std::string& path) override;
  absl::Status SyncDirectory(const std::string& path) override;
  absl::StatusOr<std::vector<std::string>> List(const std::string& path, size_t count_max) override;
  absl::StatusOr<FileInfo> Stat(const std::string& path) override;
  absl::StatusOr<Space> SpaceOf(const std::string& path) override;

  // --- IoRing ---
  void Write(IoFile& file, uint64_t offset_bytes, std::span<const std::byte> data,
             Done done) override;
  void Read(IoFile& file, uint64_t offset_bytes, std::span<std::byte> data, Done done) override;
  void Sync(IoFile& file, Done done) override;
  bool RegisterMemory(std::span<std::byte> memory) override;
  void UnregisterMemory(std::span<std::byte> memory) override;
  int event_fd() const override { return -1; }
  void RunCompletions() override;
  size_t in_flight_count() const override { return in_flight_.size(); }
  std::string Describe() const override { return "simulated disk"; }

 private:
  class Writable;
  class Opened;
  struct OpenFile {
    uint64_t node = 0;
    Caching caching = Caching::kBuffered;
    bool writable = false;
  };
  struct Fault {
    Operation operation;
    uint64_t countdown;
    bool repeats;
    absl::Status status;
    std::string path_part;
  };
  struct RingOperation {
    Operation operation;
    int handle = 0;
    uint64_t offset_bytes = 0;
    std::span<const std::byte> source = {};
    std::span<std::byte> target = {};
    uint64_t sequence = 0;  // kRingSync: covers changes up to this
    Done done = {};
  };
  // A name to be created or removed, looked up.
  struct Place {
    uint64_t directory = 0;
    std::string name;
    uint64_t node = 0;  // 0: there is none
  };

  static bool Mutates(Operation operation);
  // Power, planned faults, read-only: what every operation begins with.
  absl::Status Begin(Operation operation, const char* verb, const std::string& path);
  absl::StatusOr<Place> Lookup(const char* verb, const std::string& path) const;
  absl::StatusOr<uint64_t> FindFile(const char* verb, const std::string& path) const;
  absl::StatusOr<uint64_t> FindDirectory(const char* verb, const std::string& path) const;
  uint64_t FreeBytes() const;
  absl::Status AppendTo(uint64_t node, std::span<const std::byte> data);
  absl::Status SyncNode(Operation operation, uint64_t node, uint64_t sequence);
  int Open(uint64_t node, Caching caching, bool writable);
  void Close(int handle);
  void Submit(IoFile& file, RingOperation operation);
  absl::Status Carry(const RingOperation& operation);
  absl::Status CarryTransfer(const RingOperation& operation, const OpenFile& file);
  absl::Status WriteNode(const RingOperation& operation, const OpenFile& file);
  absl::Status ReadNode(const RingOperation& operation, const OpenFile& file) const;
  uint64_t Random();

  Options options_;
  SimDiskState state_;
  std::map<int, OpenFile> open_files_;
  int next_handle_ = 1000;  // never reused, so that a file of before a reboot is known as dead
  std::vector<RingOperation> in_flight_;
  std::vector<Fault> faults_;
  uint64_t fault_count_ = 0;
  uint64_t mutating_count_ = 0;
  std::optional<uint64_t> cut_after_;  // mutating operations left
  bool power_was_cut_ = false;
  bool read_only_ = false;
  uint64_t random_;
};

// Every operation that can be made to fail, named for people.
struct NamedOperation {
  SimDisk::Operation operation;
  const char* name;
};
inline constexpr NamedOperation kSimDiskOperations[] = {
    {SimDisk::Operation::kCreateNew, "create"},
    {SimDisk::Operation::kAppend, "append"},
    {SimDisk::Operation::kSyncFile, "sync file"},
    {SimDisk::Operation::kCreateSized, "create image"},
    {SimDisk::Operation::kOpenForRead, "open"},
    {SimDisk::Operation::kReadSmallFile, "read file"},
    {SimDisk::Operation::kLink, "link"},
    {SimDisk::Operation::kUnlink, "unlink"},
    {SimDisk::Operation::kCreateDirectory, "create directory"},
    {SimDisk::Operation::kSyncDirectory, "sync directory"},
    {SimDisk::Operation::kList, "list"},
    {SimDisk::Operation::kStat, "stat"},
    {SimDisk::Operation::kSpaceOf, "space"},
    {SimDisk::Operation::kRingWrite, "write"},
    {SimDisk::Operation::kRingRead, "read"},
    {SimDisk::Operation::kRingSync, "sync image"},
};

// Blocking reads (ReadAt of checkpoint/verify.h): all completions run inside.
std::function<absl::Status(IoFile& file, uint64_t offset, std::span<std::byte> out)> SimReadAt(
    SimDisk& disk);

}  // namespace holdfast

#endif  // HOLDFAST_TESTS_SUPPORT_SIM_DISK_H_
