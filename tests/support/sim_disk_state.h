// What a simulated disk holds: what readers see, what is durable, and the list of changes between
// the two. Plain data with the rules of survival; knows nothing of operations, faults or rings
// (that is sim_disk.h, which has the written model).
#ifndef HOLDFAST_TESTS_SUPPORT_SIM_DISK_STATE_H_
#define HOLDFAST_TESTS_SUPPORT_SIM_DISK_STATE_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace holdfast {

// One change that is visible and not yet durable.
struct SimItem {
  enum class Kind { kSize, kWrite, kName };
  Kind kind = Kind::kWrite;
  uint64_t object = 0;        // the file, or the directory of a name
  uint64_t sequence = 0;      // in order of issue over the whole disk
  uint64_t offset_bytes = 0;  // kWrite
  std::string bytes = {};     // kWrite
  uint64_t size_bytes = 0;    // kSize: the file has at least this size
  std::string name = {};      // kName
  uint64_t target = 0;        // kName: what the name stands for from now on; 0: it is removed
};

// Which unsynced changes survive a power cut. Made by None(), All() or SimDisk::LegalSurvivors().
class Survivors {
 public:
  static Survivors None() { return Survivors("none", Default::kNone, {}); }
  static Survivors All() { return Survivors("all", Default::kAll, {}); }

  // For a failure message: "all but #3 write /a/b [0, 4096)".
  const std::string& description() const { return description_; }

 private:
  friend class SimDiskState;
  friend class SurvivorsLister;
  enum class Default { kNone, kAll, kListed };
  Survivors(std::string description, Default policy, std::vector<uint32_t> kept)
      : description_(std::move(description)), default_(policy), kept_(std::move(kept)) {}

  std::string description_;
  Default default_;
  // Per item, in order: of a write the number of sectors kept, from its first on; else 0 or 1.
  std::vector<uint32_t> kept_;
};

// Copyable: a copy is another disk in the same state.
class SimDiskState {
 public:
  static constexpr uint64_t kRoot = 1;

  struct Node {
    bool is_directory = false;
    std::string visible, durable;                          // a file's bytes
    std::map<std::string, uint64_t> names, durable_names;  // a directory's
    int link_count = 0;                                    // visible names of this node
    int open_count = 0;
  };

  // Sectors are the unit of a torn write. Bytes inside a file that nothing has written, or whose
  // write was lost, read as `stale`.
  SimDiskState(uint64_t sector_bytes, char stale);

  // The node of an absolute path; 0 if there is none. A component that is a file finds nothing.
  uint64_t Find(std::string_view path) const;
  Node& node(uint64_t id) { return nodes_.at(id); }
  const Node& node(uint64_t id) const { return nodes_.at(id); }
  // Some path of the node, for messages; "(unlinked)" if it has none.
  std::string PathOf(uint64_t id) const;

  uint64_t NewFile();
  uint64_t NewDirectory();

  // The visible changes; each is unsynced until Sync.
  void SetName(uint64_t directory, const std::string& name, uint64_t target);
  void RemoveName(uint64_t directory, const std::string& name);
  void Extend(uint64_t file, uint64_t size_bytes);
  void Write(uint64_t file, uint64_t offset_bytes, std::string_view bytes);
  // A write in flight when the power was cut: never visible, and may survive.
  void WriteInFlight(uint64_t file, uint64_t offset_bytes, std::string_view bytes);

  uint64_t last_sequence() const { return next_sequence_ - 1; }
  // Makes the changes of `object` up to and including `sequence` durable.
  void Sync(uint64_t object, uint64_t sequence);
  // A sync that failed: these changes stay visible and will never be durable.
  void LoseUnsynced(uint64_t object, uint64_t sequence);

  // Bytes taken: visible or open files, each rounded up to sectors.
  uint64_t UsedBytes() const;
  const std::vector<SimItem>& items() const { return items_; }
  std::vector<std::string> DescribeItems() const;

  // Every choice of survivors this module knows, each effect once: none, all, names only, data
  // only, all but one, only one, each prefix of each file and directory (with all and with nothing
  // of the others), and for each write of n sectors its torn prefixes: all n - 1 of them, or if
  // `every_tear` is not set 1 and n - 1 sectors.
  struct Enumeration {
    bool every_tear = false;
  };
  std::vector<Survivors> LegalSurvivors(const Enumeration& enumeration) const;

  // The disk after the power came back.
  SimDiskState Rebooted(const Survivors& survivors) const;

  uint64_t sector_bytes() const { return sector_bytes_; }

 private:
  friend class SurvivorsLister;
  uint32_t UnitsOf(const SimItem& item) const;  // sectors of a write, else 1
  void Apply(const SimItem& item, uint32_t kept_units);
  void AddItem(SimItem item);
  void CountLinksAndCollect();
  std::string Describe(size_t index) const;

  uint64_t sector_bytes_;
  char stale_;
  std::map<uint64_t, Node> nodes_;
  uint64_t next_node_ = kRoot;
  std::vector<SimItem> items_;
  uint64_t next_sequence_ = 1;
};

}  // namespace holdfast

#endif  // HOLDFAST_TESTS_SUPPORT_SIM_DISK_STATE_H_
