// The trial: create a small file for direct transfers, write one aligned page to it, give it a
// second name, remove both. What the kernel says of itself (file system type, direct alignment,
// identity of the mount) is asked by path and used where it answers; in a simulation it does not.
//
// The cache file, one per mount and boot, is text:
//   holdfast mount facts 1\n
//   <name>=<value>\n ...          the fields of Encode(), in its order, and no other
//   crc32c=<8 hexadecimal digits of all bytes before this line>\n
#include "io/mount_probe.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/crc32c.h"
#include "base/status_macros.h"
#include "io/errno_status.h"

namespace holdfast {
namespace {

constexpr uint64_t kAlignmentBytesDefault = 4096;
constexpr uint64_t kAlignmentBytesMax = 65536;
constexpr uint64_t kMemoryAlignmentBytes = 4096;  // of every buffer of ours: a page
constexpr uint64_t kTrialBytes = 65536;           // a multiple of every alignment that we accept
constexpr uint32_t kTransfersInFlightBuffered = 8;
constexpr int kTrialNamesMax = 100;
constexpr uint64_t kCacheFileBytesMax = 4096;
constexpr std::string_view kHeader = "holdfast mount facts 1\n";

struct KnownFileSystem {
  uint32_t magic;
  const char* name;
};
// From linux/magic.h and the file systems' own sources.
constexpr KnownFileSystem kKnownFileSystems[] = {
    {0xEF53, "ext4"},     {0x58465342, "xfs"},    {0x9123683E, "btrfs"}, {0x2FC12FC1, "zfs"},
    {0xF2F52010, "f2fs"}, {0x01021994, "tmpfs"},  {0x858458F6, "ramfs"}, {0x794C7630, "overlay"},
    {0x6969, "nfs"},      {0xFF534D42, "cifs"},   {0xFE534D42, "smb"},   {0x0BD00BD0, "lustre"},
    {0x47504653, "gpfs"}, {0x19830326, "beegfs"}, {0x00C36400, "ceph"},  {0x65735546, "fuse"},
    {0x01021997, "9p"},   {0x4D44, "vfat"},
};

std::string FileSystemOf(const std::string& directory) {
  struct statfs found {};
  if (statfs(directory.c_str(), &found) != 0) return "unknown";
  const auto magic = static_cast<uint32_t>(found.f_type);
  for (const KnownFileSystem& known : kKnownFileSystems) {
    if (known.magic == magic) return known.name;
  }
  return absl::StrFormat("0x%x", magic);
}

// Names the mount for as long as the machine is up; the path itself where the kernel cannot say.
std::string MountKey(const std::string& directory) {
  struct statx found {};
  struct statfs file_system {};
  if (statx(AT_FDCWD, directory.c_str(), 0, STATX_BASIC_STATS | STATX_MNT_ID, &found) != 0 ||
      statfs(directory.c_str(), &file_system) != 0) {
    return absl::StrCat("path ", directory);
  }
  return absl::StrFormat("device %d:%d mount %d type %x", found.stx_dev_major, found.stx_dev_minor,
                         (found.stx_mask & STATX_MNT_ID) != 0 ? found.stx_mnt_id : 0,
                         static_cast<uint32_t>(file_system.f_type));
}

bool IsUsableAlignment(uint64_t bytes) {
  return bytes > 0 && bytes <= kAlignmentBytesMax && (bytes & (bytes - 1)) == 0;
}

// What the kernel says of direct transfers to this file. Sets `facts` accordingly.
void AskAlignment(const std::string& path, MountFacts& facts) {
  facts.alignment_bytes = kAlignmentBytesDefault;
  struct statx found {};
  if (statx(AT_FDCWD, path.c_str(), AT_SYMLINK_NOFOLLOW, STATX_DIOALIGN, &found) != 0 ||
      (found.stx_mask & STATX_DIOALIGN) == 0) {
    return;  // a kernel before 6.1, or a file system that does not say
  }
  const uint64_t alignment =
      std::max<uint64_t>(found.stx_dio_mem_align, found.stx_dio_offset_align);
  if (found.stx_dio_mem_align > kMemoryAlignmentBytes) {
    facts.direct_supported = false;
    facts.direct_refusal =
        absl::StrFormat("O_DIRECT needs memory aligned to %d bytes, blocks are aligned to %d",
                        found.stx_dio_mem_align, kMemoryAlignmentBytes);
  } else if (IsUsableAlignment(alignment)) {
    facts.alignment_bytes = alignment;
  } else {
    facts.direct_supported = false;
    facts.direct_refusal =
        absl::StrFormat("the kernel reports an alignment of %d bytes for O_DIRECT", alignment);
  }
}

// Some file systems open a file for direct transfers and refuse the transfer. Returns 0 or errno.
int WriteOnePage(const IoFile& file, const std::string& path) {
  struct stat by_handle {};
  struct stat by_path {};
  const bool is_descriptor =
      fstat(file.handle(), &by_handle) == 0 && lstat(path.c_str(), &by_path) == 0 &&
      by_handle.st_dev == by_path.st_dev && by_handle.st_ino == by_path.st_ino;
  if (!is_descriptor) return 0;  // a simulated file
  const std::unique_ptr<void, void (*)(void*)> page(std::aligned_alloc(kTrialBytes, kTrialBytes),
                                                    &std::free);
  if (page == nullptr) return ENOMEM;
  std::memset(page.get(), 0, kTrialBytes);
  return pwrite(file.handle(), page.get(), kTrialBytes, 0) < 0 ? errno : 0;
}

// The fields of the cache file.
struct CacheRecord {
  std::string boot;
  std::string mount;
  MountFacts facts;
};

std::string Encode(const CacheRecord& record) {
  const MountFacts& facts = record.facts;
  std::string text = absl::StrCat(
      std::string(kHeader), "boot=", record.boot, "\nmount=", record.mount,
      "\nfile_system=", facts.file_system, "\ndirect_supported=", facts.direct_supported ? 1 : 0,
      "\ndirect_refusal=", facts.direct_refusal, "\nalignment_bytes=", facts.alignment_bytes,
      "\nlinks_supported=", facts.links_supported ? 1 : 0,
      "\ntransfer_bytes=", facts.transfer_bytes,
      "\ntransfers_in_flight=", facts.transfers_in_flight, "\n");
  absl::StrAppendFormat(&text, "crc32c=%08x\n", Crc32c(std::as_bytes(std::span(text))));
  return text;
}

// Takes "<name>=<value>\n" off the front of `text`.
bool TakeField(std::string_view& text, std::string_view name, std::string& value) {
  const size_t end = text.find('\n');
  if (end == std::string_view::npos) return false;
  const std::string_view line = text.substr(0, end);
  if (!line.starts_with(name) || line.size() == name.size() || line[name.size()] != '=') {
    return false;
  }
  value = std::string(line.substr(name.size() + 1));
  text.remove_prefix(end + 1);
  return true;
}

template <typename Number>
bool TakeNumber(std::string_view& text, std::string_view name, Number& number) {
  std::string value;
  if (!TakeField(text, name, value)) return false;
  const char* end = value.data() + value.size();
  const auto [parsed, error] = std::from_chars(value.data(), end, number);
  return error == std::errc() && parsed == end;
}

// Empty if anything at all is not as Encode() writes it.
std::optional<CacheRecord> Decode(const std::string& bytes) {
  CacheRecord record;
  MountFacts& facts = record.facts;
  std::string_view text = bytes;
  uint32_t direct_supported = 0;
  uint32_t links_supported = 0;
  if (!text.starts_with(kHeader)) return std::nullopt;
  text.remove_prefix(kHeader.size());
  if (!TakeField(text, "boot", record.boot) || !TakeField(text, "mount", record.mount) ||
      !TakeField(text, "file_system", facts.file_system) ||
      !TakeNumber(text, "direct_supported", direct_supported) ||
      !TakeField(text, "direct_refusal", facts.direct_refusal) ||
      !TakeNumber(text, "alignment_bytes", facts.alignment_bytes) ||
      !TakeNumber(text, "links_supported", links_supported) ||
      !TakeNumber(text, "transfer_bytes", facts.transfer_bytes) ||
      !TakeNumber(text, "transfers_in_flight", facts.transfers_in_flight)) {
    return std::nullopt;
  }
  facts.direct_supported = direct_supported == 1;
  facts.links_supported = links_supported == 1;
  // The rest, checksum included, by writing it anew.
  if (Encode(record) != bytes || !IsUsableAlignment(facts.alignment_bytes)) return std::nullopt;
  return record;
}

std::string BootOf(FileSystem& file_system) {
  absl::StatusOr<std::string> boot =
      file_system.ReadSmallFile("/proc/sys/kernel/random/boot_id", 64);
  if (!boot.ok()) return "unknown";  // a simulation, or no /proc
  while (!boot->empty() && boot->back() == '\n') boot->pop_back();
  return *boot;
}

// Removes a trial file, whatever becomes of the trial. What a crash leaves behind is empty and in
// nobody's way: the next trial takes another name.
class TrialName {
 public:
  TrialName(FileSystem& file_system, std::string path)
      : file_system_(file_system), path_(std::move(path)) {}
  ~TrialName() { file_system_.Unlink(path_).IgnoreError(); }
  TrialName(const TrialName&) = delete;
  TrialName& operator=(const TrialName&) = delete;

 private:
  FileSystem& file_system_;
  const std::string path_;
};

}  // namespace

std::string MountFacts::DirectRefusal(uint64_t block_bytes) const {
  if (!direct_supported) return direct_refusal;
  if (block_bytes % alignment_bytes == 0) return "";
  return absl::StrFormat(
      "blocks of %d bytes: direct transfers there need multiples of %d bytes (the device's or file "
      "system's alignment)",
      block_bytes, alignment_bytes);
}

std::string MountFacts::Describe() const {
  const std::string caching = direct_supported
                                  ? absl::StrFormat("O_DIRECT aligned to %d bytes", alignment_bytes)
                                  : absl::StrFormat("buffered (%s)", direct_refusal);
  return absl::StrFormat("%s, %s, %s, %d transfers of %d bytes", file_system, caching,
                         links_supported ? "links" : "no links", transfers_in_flight,
                         transfer_bytes);
}

MountProbe::MountProbe(FileSystem& file_system, std::string cache_directory)
    : file_system_(file_system), cache_directory_(std::move(cache_directory)) {}

uint64_t MountProbe::trial_count() const {
  MutexLock lock(mutex_);
  return trial_count_;
}

absl::StatusOr<MountFacts> MountProbe::Probe(const std::string& directory) {
  const std::string mount = MountKey(directory);
  {
    MutexLock lock(mutex_);
    if (const auto known = known_.find(mount); known != known_.end()) return known->second;
  }
  CacheRecord record{.boot = BootOf(file_system_), .mount = mount, .facts = {}};
  const std::string key = absl::StrCat(record.boot, " ", mount);
  const std::string cache_path =
      absl::StrFormat("%s/mount-%08x", cache_directory_, Crc32c(std::as_bytes(std::span(key))));
  bool cached = false;
  if (!cache_directory_.empty()) {
    const absl::StatusOr<std::string> bytes =
        file_system_.ReadSmallFile(cache_path, kCacheFileBytesMax);
    const std::optional<CacheRecord> found = bytes.ok() ? Decode(*bytes) : std::nullopt;
    cached = found.has_value() && found->boot == record.boot && found->mount == record.mount;
    if (cached) record.facts = found->facts;
  }
  if (!cached) {
    ASSIGN_OR_RETURN(record.facts, Try(directory));
    if (!cache_directory_.empty()) WriteCache(cache_path, Encode(record));
  }
  MutexLock lock(mutex_);
  if (!cached) ++trial_count_;
  return known_.emplace(mount, record.facts).first->second;
}

void MountProbe::WriteCache(const std::string& path, const std::string& text) {
  // Dropped errors: a cache that cannot be written costs the next agent a trial, no more. Not
  // synced: what a power cut leaves of it fails its checksum.
  file_system_.Unlink(path).IgnoreError();
  const absl::StatusOr<std::unique_ptr<WritableFile>> file = file_system_.CreateNew(path);
  if (file.ok()) (*file)->Append(std::as_bytes(std::span(text))).IgnoreError();
}

absl::StatusOr<MountFacts> MountProbe::Try(const std::string& directory) {
  MountFacts facts;
  facts.file_system = FileSystemOf(directory);
  facts.direct_supported = true;
  absl::StatusOr<std::unique_ptr<IoFile>> file = absl::UnknownError("not tried");
  std::string path;
  for (int number = 0; number < kTrialNamesMax; ++number) {
    path = absl::StrFormat("%s/.holdfast-probe.%d.%d", directory, getpid(), number);
    const Caching caching = facts.direct_supported ? Caching::kDirect : Caching::kBuffered;
    file = file_system_.CreateSized(path, kTrialBytes, caching);
    if (absl::IsInvalidArgument(file.status()) && facts.direct_supported) {
      facts.direct_supported = false;
      facts.direct_refusal = std::string(file.status().message());
      continue;
    }
    if (!absl::IsAlreadyExists(file.status())) break;
  }
  RETURN_IF_ERROR(file.status());
  const TrialName name(file_system_, path);
  if (facts.direct_supported) AskAlignment(path, facts);
  if (facts.direct_supported) {
    if (const int error = WriteOnePage(**file, path); error == EINVAL || error == EOPNOTSUPP) {
      facts.direct_supported = false;
      facts.direct_refusal = std::string(ErrnoStatus(error, "direct write to", path).message());
    } else if (error != 0) {
      return ErrnoStatus(error, "write", path);
    }
  }
  if (!facts.direct_supported) facts.transfers_in_flight = kTransfersInFlightBuffered;

  const std::string second_path = absl::StrCat(path, ".link");
  const absl::Status linked = file_system_.Link(path, second_path);
  if (!linked.ok() && !absl::IsUnimplemented(linked)) return linked;
  facts.links_supported = linked.ok();
  if (linked.ok()) RETURN_IF_ERROR(file_system_.Unlink(second_path));
  return facts;
}

}  // namespace holdfast
