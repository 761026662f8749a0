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
#include <hdf5.h>
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

namespace holdfast {
namespace {

// Closes an HDF5 identifier. Negative: none.
class Handle {
 public:
  Handle() = default;
  Handle(hid_t id, herr_t (*close)(hid_t)) : id_(id), close_(close) {}
  ~Handle() { Close(); }
  Handle(Handle&& other) noexcept : id_(std::exchange(other.id_, -1)), close_(other.close_) {}
  Handle& operator=(Handle&& other) noexcept {
    if (this != &other) {
      Close();
      id_ = std::exchange(other.id_, -1);
      close_ = other.close_;
    }
    return *this;
  }

  bool ok() const { return id_ >= 0; }
  hid_t get() const { return id_; }
  // False if libhdf5 reported an error, e.g. of a write that it had put off.
  bool Close() {
    const hid_t id = std::exchange(id_, -1);
    return id < 0 || close_(id) >= 0;
  }

 private:
  hid_t id_ = -1;
  herr_t (*close_)(hid_t) = nullptr;
};

// The calling thread's HDF5 error stack in one line, and empties it.
std::string TakeErrorText() {
  std::string text;
  const auto append = [](unsigned, const H5E_error2_t* error, void* out) -> herr_t {
    auto& to = *static_cast<std::string*>(out);
    if (to.size() < 1000) {
      absl::StrAppend(&to, to.empty() ? "" : "; ", error->func_name, ": ", error->desc);
    }
    return 0;
  };
  // The walk fails only without a stack; then there is no text.
  static_cast<void>(H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, append, &text));
  static_cast<void>(H5Eclear2(H5E_DEFAULT));
  return text.empty() ? "no error text" : text;
}

absl::Status Hdf5Error(const std::string& what) {
  return absl::InternalError(absl::StrCat("HDF5: cannot ", what, ": ", TakeErrorText()));
}

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

// bool is h5py's enumeration, read as numpy bool. bfloat16 and float8_e5m2 are IEEE-like, so HDF5
// can be told and converts them. float8_e4m3fn is not (no infinity, one NaN): as a custom float 448
// would read as NaN, so it is opaque bytes (with an empty tag: h5py
// cannot read others).
Handle MakeType(Dtype dtype) {
  const auto copy = [](hid_t type) { return Handle(H5Tcopy(type), H5Tclose); };
  switch (dtype) {
    case Dtype::kBool: {
      Handle type(H5Tenum_create(H5T_STD_I8LE), H5Tclose);
      const signed char no = 0;
      const signed char yes = 1;
      if (!type.ok() || H5Tenum_insert(type.get(), "FALSE", &no) < 0 ||
          H5Tenum_insert(type.get(), "TRUE", &yes) < 0) {
        return {};
      }
      return type;
    }
    case Dtype::kUint8:
      return copy(H5T_STD_U8LE);
    case Dtype::kInt8:
      return copy(H5T_STD_I8LE);
    case Dtype::kUint16:
      return copy(H5T_STD_U16LE);
    case Dtype::kInt16:
      return copy(H5T_STD_I16LE);
    case Dtype::kUint32:
      return copy(H5T_STD_U32LE);
    case Dtype::kInt32:
      return copy(H5T_STD_I32LE);
    case Dtype::kUint64:
      return copy(H5T_STD_U64LE);
    case Dtype::kInt64:
      return copy(H5T_STD_I64LE);
    case Dtype::kFloat32:
      return copy(H5T_IEEE_F32LE);
    case Dtype::kFloat64:
      return copy(H5T_IEEE_F64LE);
    case Dtype::kFloat16:
    case Dtype::kBfloat16:
    case Dtype::kFloat8E5m2: {
      struct Fields {
        size_t bits, exponent_at, exponent_bits, bias;
      };
      const Fields fields = dtype == Dtype::kFloat16    ? Fields{16, 10, 5, 15}
                            : dtype == Dtype::kBfloat16 ? Fields{16, 7, 8, 127}
                                                        : Fields{8, 2, 5, 15};
      Handle type = copy(H5T_IEEE_F32LE);
      // Fields before size: each step must leave a consistent type.
      if (!type.ok() ||
          H5Tset_fields(type.get(), fields.bits - 1, fields.exponent_at, fields.exponent_bits, 0,
                        fields.exponent_at) < 0 ||
          H5Tset_precision(type.get(), fields.bits) < 0 ||
          H5Tset_size(type.get(), fields.bits / 8) < 0 ||
          H5Tset_ebias(type.get(), fields.bias) < 0) {
        return {};
      }
      return type;
    }
    case Dtype::kFloat8E4m3fn: {
      Handle type(H5Tcreate(H5T_OPAQUE, 1), H5Tclose);
      if (!type.ok() || H5Tset_tag(type.get(), "") < 0) return {};
      return type;
    }
  }
  return {};
}

Handle MakeTextType(size_t bytes) {
  Handle type(H5Tcopy(H5T_C_S1), H5Tclose);
  if (!type.ok() || H5Tset_size(type.get(), bytes) < 0 ||
      H5Tset_cset(type.get(), H5T_CSET_UTF8) < 0 ||
      H5Tset_strpad(type.get(), H5T_STR_NULLPAD) < 0) {
    return {};
  }
  return type;
}

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
  absl::Status CreateGroups();
  absl::Status CreateDataset(size_t index);
  absl::Status AddAttribute(hid_t object, const Hdf5Attribute& attribute);
  absl::StatusOr<hid_t> TypeOf(Dtype dtype);

  const Hdf5Plan& plan_;
  const uint64_t metadata_bytes_;
  std::vector<Extent> extents_;

  Handle file_;
  Handle dataset_properties_;
  Handle scalar_;
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
    return Hdf5Error("set file access properties");
  }
  const Handle creation(H5Pcreate(H5P_FILE_CREATE), H5Pclose);
  if (!creation.ok() || H5Pset_obj_track_times(creation.get(), false) < 0 ||
      H5Pset_file_space_strategy(creation.get(), H5F_FSPACE_STRATEGY_AGGR, false, 1) < 0) {
    return Hdf5Error("set file creation properties");
  }
  file_ = Handle(H5Fcreate(path.c_str(), H5F_ACC_TRUNC, creation.get(), access.get()), H5Fclose);
  if (!file_.ok()) return Hdf5Error(absl::StrCat("create ", path));

  dataset_properties_ = Handle(H5Pcreate(H5P_DATASET_CREATE), H5Pclose);
  const hid_t properties = dataset_properties_.get();
  if (!dataset_properties_.ok() || H5Pset_layout(properties, H5D_CONTIGUOUS) < 0 ||
      H5Pset_alloc_time(properties, H5D_ALLOC_TIME_EARLY) < 0 ||
      H5Pset_fill_time(properties, H5D_FILL_TIME_NEVER) < 0 ||
      H5Pset_obj_track_times(properties, false) < 0) {
    return Hdf5Error("set dataset properties");
  }
  scalar_ = Handle(H5Screate(H5S_SCALAR), H5Sclose);
  return scalar_.ok() ? absl::OkStatus() : Hdf5Error("create a scalar dataspace");
}

absl::Status Builder::CreateGroups() {
  for (const Hdf5Group& group : plan_.groups) {
    const Handle creation(H5Pcreate(H5P_GROUP_CREATE), H5Pclose);
    // Names in a heap that must grow are copied again and again, and leave holes in the head.
    const uint64_t heap_bytes = std::min<uint64_t>(group.names_bytes_hint, UINT32_MAX);
    if (!creation.ok() || H5Pset_obj_track_times(creation.get(), false) < 0 ||
        H5Pset_local_heap_size_hint(creation.get(), heap_bytes) < 0) {
      return Hdf5Error("set group properties");
    }
    groups_.push_back(group.path == "/"
                          ? Handle(H5Gopen2(file_.get(), "/", H5P_DEFAULT), H5Gclose)
                          : Handle(H5Gcreate2(file_.get(), group.path.c_str(), H5P_DEFAULT,
                                              creation.get(), H5P_DEFAULT),
                                   H5Gclose));
    if (!groups_.back().ok()) return Hdf5Error(absl::StrCat("create group ", group.path));
    for (const Hdf5Attribute& attribute : group.attributes) {
      RETURN_IF_ERROR(AddAttribute(groups_.back().get(), attribute));
    }
  }
  return absl::OkStatus();
}

absl::Status Builder::AddAttribute(hid_t object, const Hdf5Attribute& attribute) {
  Handle text_type;
  Handle vector_space;
  hid_t type = H5T_STD_U64LE;
  hid_t space = scalar_.get();
  const void* value = nullptr;
  if (const auto* text = std::get_if<std::string_view>(&attribute.value)) {
    CHECK(!text->empty());
    text_type = MakeTextType(text->size());
    type = text_type.get();
    value = text->data();
  } else if (const auto* number = std::get_if<uint64_t>(&attribute.value)) {
    value = number;
  } else {
    const auto& numbers = std::get<std::vector<uint64_t>>(attribute.value);
    const hsize_t count = numbers.size();
    vector_space = Handle(H5Screate_simple(1, &count, nullptr), H5Sclose);
    space = vector_space.get();
    value = numbers.data();
    if (count == 0) value = &count;  // HDF5 refuses a null pointer even to no elements
  }
  Handle handle(H5Acreate2(object, attribute.name, type, space, H5P_DEFAULT, H5P_DEFAULT),
                H5Aclose);
  if (!handle.ok() || H5Awrite(handle.get(), type, value) < 0 || !handle.Close()) {
    return Hdf5Error(absl::StrCat("write attribute ", attribute.name));
  }
  return absl::OkStatus();
}

absl::StatusOr<hid_t> Builder::TypeOf(Dtype dtype) {
  Handle& type = types_[dtype];
  if (!type.ok()) type = MakeType(dtype);
  if (!type.ok()) {
    return Hdf5Error(absl::StrFormat("make a type for %s", DtypeName(dtype)));
  }
  return type.get();
}

absl::Status Builder::CreateDataset(size_t index) {
  const Hdf5Dataset dataset = plan_.dataset(index);
  CHECK(dataset.group < groups_.size());
  const bool is_text = !dataset.text.empty();
  Handle text_type;
  Handle vector_space;
  hid_t type = -1;
  hid_t space = scalar_.get();
  uint64_t bytes = 0;
  if (is_text) {
    text_type = MakeTextType(dataset.text.size());
    type = text_type.get();
    bytes = dataset.text.size();
  } else {
    ASSIGN_OR_RETURN(type, TypeOf(dataset.dtype));
    bytes = ElementBytes(dataset.dtype);
    for (const uint64_t extent : dataset.shape) bytes *= extent;
    if (!dataset.shape.empty()) {
      std::vector<hsize_t> shape(dataset.shape.begin(), dataset.shape.end());
      vector_space =
          Handle(H5Screate_simple(static_cast<int>(shape.size()), shape.data(), nullptr), H5Sclose);
      space = vector_space.get();
    }
  }
  Handle handle(H5Dcreate2(groups_[dataset.group].get(), dataset.name.c_str(), type, space,
                           H5P_DEFAULT, dataset_properties_.get(), H5P_DEFAULT),
                H5Dclose);
  if (!handle.ok()) return Hdf5Error(absl::StrCat("create dataset ", dataset.name));
  for (const Hdf5Attribute& attribute : dataset.attributes) {
    RETURN_IF_ERROR(AddAttribute(handle.get(), attribute));
  }
  if (is_text &&
      H5Dwrite(handle.get(), type, H5S_ALL, H5S_ALL, H5P_DEFAULT, dataset.text.data()) < 0) {
    return Hdf5Error(absl::StrCat("write dataset ", dataset.name));
  }
  if (bytes > 0) {
    const haddr_t offset = H5Dget_offset(handle.get());
    if (offset == HADDR_UNDEF) return Hdf5Error(absl::StrCat("place dataset ", dataset.name));
    extents_.push_back({index, offset, bytes, is_text});
  }
  if (!handle.Close()) return Hdf5Error(absl::StrCat("close dataset ", dataset.name));
  return absl::OkStatus();
}

absl::Status Builder::Run(ScratchFile& scratch) {
  RETURN_IF_ERROR(CreateFile(scratch.path()));
  scratch.RemoveName();
  RETURN_IF_ERROR(CreateGroups());
  for (size_t i = 0; i < plan_.dataset_count; ++i) RETURN_IF_ERROR(CreateDataset(i));
  // The file closes, and is flushed, with its last object.
  groups_.clear();
  types_.clear();
  if (!file_.Close()) return Hdf5Error("close the scratch file");
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
  // A scratch file whose close failed (a full disk) would be closed once more when the process
  // ends, through a null pointer (seen in H5F__close_cb of 1.10.8). Must come before any other
  // call.
  static const bool kNoExitHandler = H5dont_atexit() >= 0;
  static_cast<void>(kNoExitHandler);
  // Errors come back as statuses; libhdf5 must not print them as well (the setting is per thread).
  static_cast<void>(H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr));

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
