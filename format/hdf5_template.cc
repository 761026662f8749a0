// How the file comes out with its metadata in front:
// - meta_block_size reserves one block at offset 0 from which libhdf5 serves all metadata. How much
//   it will need is not known before, so Build guesses, looks, and builds again if the guess was
//   too small (metadata behind payload) or wastes too much.
// - Every dataset is contiguous, allocated at creation and never filled, so libhdf5 takes its place
//   at the end of the file and writes nothing there: the scratch file stays sparse.
// - File space is handed out by the aggregators alone (H5F_FSPACE_STRATEGY_AGGR). The default also
//   keeps a list of the gaps that alignment leaves, and searches it at every creation of a small
//   dataset: 20,000 of them took 6.5 s instead of 0.4 s. It also puts small datasets into old gaps,
//   out of order. The strategy is a message in the superblock extension that HDF5 1.10 can read:
//   hence the bound V110.
// - Lower bound EARLIEST: version 1 object headers have no checksum, so that format/image.cc can
//   patch values of attributes; and old-style groups took less time than new ones and leave nothing
//   behind the payload (new ones place a part of their heap there when the file is closed).
// - No times: the bytes depend on the plan only.
#include "format/hdf5_template.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <map>
#include <optional>
#include <span>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "format/hdf5_object.h"

namespace holdfast {
namespace {

using hdf5::Handle;

// An open file that has no name any more; libhdf5 and we have it open at once.
class ScratchFile {
 public:
  explicit ScratchFile(const std::string& directory)
      : path_(absl::StrCat(directory, "/holdfast-template-XXXXXX")) {
    fd_ = mkostemp(path_.data(), O_CLOEXEC);
    if (fd_ < 0) errno_ = errno;
  }
  ~ScratchFile() {
    RemoveName();
    if (fd_ >= 0) close(fd_);
  }
  ScratchFile(const ScratchFile&) = delete;
  ScratchFile& operator=(const ScratchFile&) = delete;

  absl::Status status() const {
    if (fd_ >= 0) return absl::OkStatus();
    return absl::UnavailableError(
        absl::StrFormat("cannot create scratch file %s: %s", path_, strerror(errno_)));
  }
  const std::string& path() const { return path_; }

  void RemoveName() {
    // A name that cannot be removed costs an empty-looking file in the scratch directory, no more.
    if (fd_ >= 0 && named_) static_cast<void>(unlink(path_.c_str()));
    named_ = false;
  }

  absl::StatusOr<uint64_t> Size() const {
    struct stat info = {};
    if (fstat(fd_, &info) != 0) return Error("fstat");
    return static_cast<uint64_t>(info.st_size);
  }

  absl::Status Read(std::span<std::byte> out) const {
    size_t done = 0;
    while (done < out.size()) {
      const ssize_t n = pread(fd_, out.data() + done, out.size() - done, static_cast<off_t>(done));
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) return Error("read");
      if (n == 0) {
        return absl::InternalError(absl::StrFormat(
            "scratch file %s: expected %d bytes, found only %d", path_, out.size(), done));
      }
      done += static_cast<size_t>(n);
    }
    return absl::OkStatus();
  }

 private:
  absl::Status Error(const char* operation) const {
    return absl::UnavailableError(
        absl::StrFormat("%s of scratch file %s: %s", operation, path_, strerror(errno)));
  }

  std::string path_;
  int fd_ = -1;
  int errno_ = 0;
  bool named_ = true;
};

// One build with one guess of the metadata's size.
class Builder {
 public:
  Builder(const Hdf5Plan& plan, uint64_t metadata_bytes)
      : plan_(plan), metadata_bytes_(metadata_bytes) {}

  // Makes the file at `scratch`'s path and closes it. Afterwards offsets() are those of it.
  absl::Status Run(ScratchFile& scratch);

  struct Extent {
    size_t dataset = 0;
    uint64_t offset = 0;
    uint64_t bytes = 0;
    bool text = false;
  };
  // Of the datasets that are not empty, in order of the plan.
  const std::vector<Extent>& extents() const { return extents_; }

 private:
  absl::Status CreateFile(const std::string& path);
  absl::Status CreateDataset(size_t index);
  absl::StatusOr<hid_t> TypeOf(Dtype dtype);

  const Hdf5Plan& plan_;
  const uint64_t metadata_bytes_;
  std::vector<Extent> extents_;

  Handle file_;
  Handle dataset_properties_;
  std::map<Dtype, Handle> types_;
  std::vector<Handle> groups_;
};

absl::Status Builder::CreateFile(const std::string& path) {
  const Handle access(H5Pcreate(H5P_FILE_ACCESS), H5Pclose);
  if (!access.ok() ||
      H5Pset_libver_bounds(access.get(), H5F_LIBVER_EARLIEST, H5F_LIBVER_V110) < 0 ||
      H5Pset_meta_block_size(access.get(), metadata_bytes_) < 0 ||
      // 0: datasets smaller than 2 KiB get no block of their own, all lie in order.
      H5Pset_small_data_block_size(access.get(), 0) < 0 ||
      H5Pset_alignment(access.get(), 1, plan_.alignment_bytes) < 0) {
    return hdf5::Error("set file access properties");
  }
  const Handle creation(H5Pcreate(H5P_FILE_CREATE), H5Pclose);
  if (!creation.ok() || H5Pset_obj_track_times(creation.get(), false) < 0 ||
      H5Pset_file_space_strategy(creation.get(), H5F_FSPACE_STRATEGY_AGGR, false, 1) < 0) {
    return hdf5::Error("set file creation properties");
  }
  file_ = Handle(H5Fcreate(path.c_str(), H5F_ACC_TRUNC, creation.get(), access.get()), H5Fclose);
  if (!file_.ok()) return hdf5::Error(absl::StrCat("create ", path));

  dataset_properties_ = Handle(H5Pcreate(H5P_DATASET_CREATE), H5Pclose);
  const hid_t properties = dataset_properties_.get();
  if (!dataset_properties_.ok() || H5Pset_layout(properties, H5D_CONTIGUOUS) < 0 ||
      H5Pset_alloc_time(properties, H5D_ALLOC_TIME_EARLY) < 0 ||
      H5Pset_fill_time(properties, H5D_FILL_TIME_NEVER) < 0 ||
      H5Pset_obj_track_times(properties, false) < 0) {
    return hdf5::Error("set dataset properties");
  }
  return absl::OkStatus();
}

absl::StatusOr<hid_t> Builder::TypeOf(Dtype dtype) {
  Handle& type = types_[dtype];
  if (!type.ok()) type = hdf5::MakeType(dtype, Hdf5Order::kLittle);
  if (!type.ok()) {
    return hdf5::Error(absl::StrFormat("make a type for %s", DtypeName(dtype)));
  }
  return type.get();
}

absl::Status Builder::CreateDataset(size_t index) {
  const Hdf5Dataset dataset = plan_.dataset(index);
  CHECK(dataset.group < groups_.size());
  const bool is_text = !dataset.text.empty();
  Handle text_type;
  Handle space;
  hid_t type = -1;
  uint64_t bytes = 0;
  if (is_text) {
    text_type = hdf5::MakeTextType(dataset.text.size());
    type = text_type.get();
    bytes = dataset.text.size();
  } else {
    ASSIGN_OR_RETURN(type, TypeOf(dataset.dtype));
    bytes = ElementBytes(dataset.dtype);
    for (const uint64_t extent : dataset.shape) bytes *= extent;
  }
  space = hdf5::MakeSpace(is_text ? std::span<const uint64_t>() : dataset.shape);
  if (!space.ok()) return hdf5::Error(absl::StrCat("make the shape of ", dataset.name));
  Handle handle(H5Dcreate2(groups_[dataset.group].get(), dataset.name.c_str(), type, space.get(),
                           H5P_DEFAULT, dataset_properties_.get(), H5P_DEFAULT),
                H5Dclose);
  if (!handle.ok()) return hdf5::Error(absl::StrCat("create dataset ", dataset.name));
  for (const Hdf5Attribute& attribute : dataset.attributes) {
    RETURN_IF_ERROR(hdf5::WriteAttribute(handle.get(), attribute));
  }
  if (is_text &&
      H5Dwrite(handle.get(), type, H5S_ALL, H5S_ALL, H5P_DEFAULT, dataset.text.data()) < 0) {
    return hdf5::Error(absl::StrCat("write dataset ", dataset.name));
  }
  if (bytes > 0) {
    const haddr_t offset = H5Dget_offset(handle.get());
    if (offset == HADDR_UNDEF) return hdf5::Error(absl::StrCat("place dataset ", dataset.name));
    extents_.push_back({index, offset, bytes, is_text});
  }
  if (!handle.Close()) return hdf5::Error(absl::StrCat("close dataset ", dataset.name));
  return absl::OkStatus();
}

absl::Status Builder::Run(ScratchFile& scratch) {
  RETURN_IF_ERROR(CreateFile(scratch.path()));
  scratch.RemoveName();
  ASSIGN_OR_RETURN(groups_, hdf5::CreateGroups(file_.get(), plan_.groups));
  for (size_t i = 0; i < plan_.dataset_count; ++i) RETURN_IF_ERROR(CreateDataset(i));
  // The file closes, and is flushed, with its last object.
  groups_.clear();
  types_.clear();
  if (!file_.Close()) return hdf5::Error("close the scratch file");
  return absl::OkStatus();
}

constexpr uint64_t RoundUp(uint64_t value, uint64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// A little more than libhdf5 takes (measured with up to 100,000 datasets).
uint64_t GuessMetadataBytes(const Hdf5Plan& plan) {
  uint64_t bytes = 8192;
  for (const Hdf5Group& group : plan.groups) bytes += 1024 + 2 * group.names_bytes_hint;
  for (size_t i = 0; i < plan.dataset_count; ++i) {
    const Hdf5Dataset dataset = plan.dataset(i);
    bytes += 320 + 16 * dataset.shape.size();
    for (const Hdf5Attribute& attribute : dataset.attributes) {
      bytes += 56;
      if (const auto* text = std::get_if<std::string_view>(&attribute.value)) bytes += text->size();
      if (const auto* numbers = std::get_if<std::vector<uint64_t>>(&attribute.value)) {
        bytes += 8 * numbers->size();
      }
    }
  }
  return bytes;
}

// What one build says about its guess.
struct Attempted {
  std::optional<Hdf5Layout> layout;  // empty: metadata did not fit in front
  uint64_t metadata_used_bytes = 0;  // up to the last byte that is not zero
};

// The end of the head, if the payload lies in order behind it without room for anything else.
std::optional<uint64_t> FindHeadEnd(const std::vector<Builder::Extent>& extents,
                                    uint64_t file_bytes, uint64_t alignment_bytes) {
  uint64_t end = extents.empty() ? file_bytes : extents[0].offset;
  uint64_t head_end = end;
  for (const Builder::Extent& extent : extents) {
    if (extent.offset < end || extent.offset - end >= alignment_bytes ||
        extent.offset % alignment_bytes != 0) {
      return std::nullopt;
    }
    end = extent.offset + extent.bytes;
    if (extent.text) head_end = end;
  }
  if (end != file_bytes) return std::nullopt;
  return RoundUp(head_end, alignment_bytes);
}

absl::StatusOr<Attempted> AttemptBuild(const Hdf5Plan& plan, const std::string& scratch_directory,
                                       uint64_t metadata_bytes) {
  ScratchFile scratch(scratch_directory);
  RETURN_IF_ERROR(scratch.status());
  Builder builder(plan, metadata_bytes);
  RETURN_IF_ERROR(builder.Run(scratch));
  ASSIGN_OR_RETURN(const uint64_t file_bytes, scratch.Size());

  Attempted attempted;
  const std::vector<Builder::Extent>& extents = builder.extents();
  const std::optional<uint64_t> head_end = FindHeadEnd(extents, file_bytes, plan.alignment_bytes);
  if (!head_end.has_value()) return attempted;
  if (*head_end > plan.head_bytes_max) {
    return absl::ResourceExhaustedError(
        absl::StrFormat("HDF5 metadata of %d datasets need %d bytes; the limit is %d",
                        plan.dataset_count, *head_end, plan.head_bytes_max));
  }
  Hdf5Layout layout;
  layout.head.resize(*head_end);
  const uint64_t stored = std::min(*head_end, file_bytes);
  RETURN_IF_ERROR(scratch.Read(std::span(layout.head).first(stored)));
  uint64_t used = extents.empty() ? stored : extents[0].offset;
  while (used > 0 && layout.head[used - 1] == std::byte{0}) --used;
  attempted.metadata_used_bytes = used;

  layout.dataset_offsets.assign(plan.dataset_count, layout.head.size());
  layout.end_bytes = layout.head.size();
  for (const Builder::Extent& extent : extents) {
    layout.dataset_offsets[extent.dataset] = extent.offset;
    layout.end_bytes = std::max(layout.end_bytes, extent.offset + extent.bytes);
  }
  attempted.layout = std::move(layout);
  return attempted;
}

}  // namespace

absl::StatusOr<Hdf5Layout> BuildHdf5Layout(const Hdf5Plan& plan,
                                           const std::string& scratch_directory) {
  CHECK(!plan.groups.empty() && plan.groups[0].path == "/");
  hdf5::Prepare();

  uint64_t guess = RoundUp(GuessMetadataBytes(plan), plan.alignment_bytes);
  std::optional<Hdf5Layout> best;
  constexpr int kBuildsMax = 12;
  for (int build = 0; build < kBuildsMax; ++build) {
    ASSIGN_OR_RETURN(Attempted attempted, AttemptBuild(plan, scratch_directory, guess));
    if (!attempted.layout.has_value()) {
      if (best.has_value()) return *std::move(best);  // the tighter guess was too tight
      guess *= 2;
      if (guess > 2 * plan.head_bytes_max) break;
      continue;
    }
    const uint64_t used = attempted.metadata_used_bytes;
    const bool tightened = best.has_value();
    best = std::move(attempted.layout);
    // Room that nothing uses is written with every save. What ends in zeros counts as unused, so a
    // tighter guess leaves some room; a second build is worth it only if it saves a fifth.
    const uint64_t tight = RoundUp(used + 256 + used / 64, plan.alignment_bytes);
    if (tightened || guess - guess / 5 < tight) return *std::move(best);
    guess = tight;
  }
  return absl::ResourceExhaustedError(
      absl::StrFormat("HDF5 metadata of %d datasets do not fit into %d bytes at the front",
                      plan.dataset_count, plan.head_bytes_max));
}

std::string Hdf5LibraryVersion() {
  unsigned major = 0;
  unsigned minor = 0;
  unsigned release = 0;
  CHECK(H5get_libversion(&major, &minor, &release) >= 0);
  return absl::StrFormat("%d.%d.%d", major, minor, release);
}

}  // namespace holdfast
