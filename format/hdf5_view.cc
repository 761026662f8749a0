#include "format/hdf5_view.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <span>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "format/hdf5_object.h"

namespace holdfast {
namespace {

using hdf5::Handle;

constexpr size_t kGrowBytes = size_t{4} << 20;

// The fill value as its bytes, little-endian: only virtual datasets are filled, and those are.
std::vector<unsigned char> FillOf(Dtype dtype) {
  const size_t bytes = ElementBytes(dtype);
  std::vector<unsigned char> fill(bytes, 0);
  const auto top = [&](std::initializer_list<unsigned char> last) {
    std::copy(last.begin(), last.end(), fill.end() - static_cast<ptrdiff_t>(last.size()));
  };
  switch (dtype) {
    case Dtype::kBool:
      fill[0] = 1;
      break;
    case Dtype::kUint8:
    case Dtype::kUint16:
    case Dtype::kUint32:
    case Dtype::kUint64:
      std::fill(fill.begin(), fill.end(), static_cast<unsigned char>(0xFF));
      break;
    case Dtype::kInt8:
    case Dtype::kInt16:
    case Dtype::kInt32:
    case Dtype::kInt64:
      top({0x80});
      break;
    case Dtype::kFloat16:
      top({0x00, 0x7E});
      break;
    case Dtype::kBfloat16:
    case Dtype::kFloat32:
      top({0xC0, 0x7F});
      break;
    case Dtype::kFloat64:
      top({0xF8, 0x7F});
      break;
    case Dtype::kFloat8E4m3fn:
      top({0x7F});
      break;
    case Dtype::kFloat8E5m2:
      top({0x7E});
      break;
    case Dtype::kFloat8E4m3fnuz:
    case Dtype::kFloat8E5m2fnuz:
      top({0x80});
      break;
    case Dtype::kComplex32:
      fill = {0x00, 0x7E, 0x00, 0x7E};
      break;
    case Dtype::kComplex64:
      fill = {0x00, 0x00, 0xC0, 0x7F, 0x00, 0x00, 0xC0, 0x7F};
      break;
    case Dtype::kComplex128:
      top({0xF8, 0x7F});
      fill[6] = 0xF8;
      fill[7] = 0x7F;
      break;
    case Dtype::kFloat8E8m0fnu:
    case Dtype::kFloat4E2m1fnX2:
    case Dtype::kBits8:
    case Dtype::kBits16:
    case Dtype::kBits1x8:
    case Dtype::kBits2x4:
    case Dtype::kBits4x2:
      std::fill(fill.begin(), fill.end(), static_cast<unsigned char>(0xFF));
      break;
  }
  return fill;
}

struct TypeAndFill {
  Handle type;
  std::vector<unsigned char> fill;
};

// Builds one file in memory.
class Builder {
 public:
  explicit Builder(const Hdf5ViewPlan& plan) : plan_(plan) {}

  absl::StatusOr<std::vector<std::byte>> Run();

 private:
  absl::Status CreateFile();
  absl::StatusOr<const TypeAndFill*> TypeOf(Dtype dtype, Hdf5Order order);
  absl::StatusOr<Handle> PropertiesOf(const TypeAndFill* filled);
  absl::Status AddSource(const Hdf5ViewDataset& dataset, const Hdf5ViewSource& source,
                         hid_t properties, hid_t space);
  absl::StatusOr<std::string> CreatePart(Dtype dtype, const Hdf5ViewSource& source);
  absl::StatusOr<Handle> Create(const Hdf5ViewDataset& dataset);
  absl::Status CreateText(const Hdf5ViewDataset& dataset);
  absl::Status CreateDataset(const Hdf5ViewDataset& dataset);
  absl::Status CheckSize() const;

  const Hdf5ViewPlan& plan_;
  Handle file_;
  std::vector<Handle> groups_;
  std::map<std::pair<Dtype, Hdf5Order>, TypeAndFill> types_;
  uint64_t part_count_ = 0;
};

absl::Status Builder::CreateFile() {
  const Handle access(H5Pcreate(H5P_FILE_ACCESS), H5Pclose);
  if (!access.ok() || H5Pset_fapl_core(access.get(), kGrowBytes, /*backing_store=*/false) < 0 ||
      // Virtual Datasets need 1.10; nothing newer may be used, so that all releases since can read.
      H5Pset_libver_bounds(access.get(), H5F_LIBVER_EARLIEST, H5F_LIBVER_V110) < 0) {
    return hdf5::Error("set file access properties");
  }
  const Handle creation(H5Pcreate(H5P_FILE_CREATE), H5Pclose);
  if (!creation.ok() || H5Pset_obj_track_times(creation.get(), false) < 0) {
    return hdf5::Error("set file creation properties");
  }
  // The name of a file that is in memory only.
  file_ = Handle(H5Fcreate("holdfast-view", H5F_ACC_TRUNC, creation.get(), access.get()), H5Fclose);
  return file_.ok() ? absl::OkStatus() : hdf5::Error("create a file in memory");
}

absl::StatusOr<const TypeAndFill*> Builder::TypeOf(Dtype dtype, Hdf5Order order) {
  TypeAndFill& found = types_[{dtype, order}];
  if (!found.type.ok()) found = {hdf5::MakeType(dtype, order), FillOf(dtype)};
  if (!found.type.ok()) {
    return hdf5::Error(absl::StrFormat("make a type for %s", DtypeName(dtype)));
  }
  return &found;
}

// `filled`: what fills it where a source is missing; null for what is not virtual.
absl::StatusOr<Handle> Builder::PropertiesOf(const TypeAndFill* filled) {
  Handle properties(H5Pcreate(H5P_DATASET_CREATE), H5Pclose);
  if (!properties.ok() || H5Pset_obj_track_times(properties.get(), false) < 0 ||
      (filled != nullptr &&
       H5Pset_fill_value(properties.get(), filled->type.get(), filled->fill.data()) < 0)) {
    return hdf5::Error("set dataset properties");
  }
  return properties;
}

// Selects a box; everything of a scalar.
herr_t Select(hid_t space, std::span<const uint64_t> lo, std::span<const uint64_t> size) {
  if (lo.empty()) return H5Sselect_all(space);
  const std::vector<hsize_t> start(lo.begin(), lo.end());
  const std::vector<hsize_t> block(size.begin(), size.end());
  const std::vector<hsize_t> once(lo.size(), 1);
  return H5Sselect_hyperslab(space, H5S_SELECT_SET, start.data(), nullptr, once.data(),
                             block.data());
}

// In the names of sources "%b" would stand for a number.
std::string WithoutFormat(const std::string& name) {
  return absl::StrReplaceAll(name, {{"%", "%%"}});
}

absl::StatusOr<std::string> Builder::CreatePart(Dtype dtype, const Hdf5ViewSource& source) {
  ASSIGN_OR_RETURN(const TypeAndFill* type, TypeOf(dtype, source.order));
  uint64_t bytes = ElementBytes(dtype);
  for (const uint64_t extent : source.shape) bytes *= extent;
  const Handle properties(H5Pcreate(H5P_DATASET_CREATE), H5Pclose);
  if (!properties.ok() || H5Pset_obj_track_times(properties.get(), false) < 0 ||
      H5Pset_external(properties.get(), source.file.c_str(),
                      static_cast<off_t>(source.offset_bytes), bytes) < 0) {
    return hdf5::Error("set properties of a part");
  }
  const std::string name = absl::StrCat(part_count_++);
  const Handle space = hdf5::MakeSpace(source.shape);
  if (!space.ok()) return hdf5::Error("make the shape of a part");
  Handle part(H5Dcreate2(groups_[plan_.parts_group].get(), name.c_str(), type->type.get(),
                         space.get(), H5P_DEFAULT, properties.get(), H5P_DEFAULT),
              H5Dclose);
  if (!part.ok() || !part.Close()) return hdf5::Error(absl::StrCat("create part ", name));
  return absl::StrCat(plan_.groups[plan_.parts_group].path, "/", name);
}

absl::Status Builder::AddSource(const Hdf5ViewDataset& dataset, const Hdf5ViewSource& source,
                                hid_t properties, hid_t space) {
  std::string file = source.file;
  std::string path = source.dataset;
  if (dataset.storage == Hdf5Storage::kParts) {
    ASSIGN_OR_RETURN(path, CreatePart(dataset.dtype, source));
    file = ".";
  }
  file = WithoutFormat(file);
  path = WithoutFormat(path);
  const Handle source_space = hdf5::MakeSpace(source.shape);
  if (!source_space.ok()) return hdf5::Error("make the shape of a source");
  CHECK(source.from.empty() || (source.from.size() == 1 && source.boxes.size() == 1));
  uint64_t at = 0;
  for (const Hdf5Box& box : source.boxes) {
    CHECK(box.lo.size() == dataset.shape.size() && box.size.size() == box.lo.size());
    uint64_t count = 1;
    for (const uint64_t extent : box.size) count *= extent;
    // Of several boxes each is a range of a source in one dimension.
    CHECK(source.boxes.size() == 1 || source.shape.size() == 1);
    const herr_t selected =
        !source.from.empty() ? Select(source_space.get(), source.from[0].lo, source.from[0].size)
        : source.boxes.size() == 1 ? H5Sselect_all(source_space.get())
                                   : Select(source_space.get(), {&at, 1}, {&count, 1});
    if (selected < 0 || Select(space, box.lo, box.size) < 0 ||
        H5Pset_virtual(properties, space, file.c_str(), path.c_str(), source_space.get()) < 0) {
      return hdf5::Error(absl::StrCat("map ", source.file, ", ", path));
    }
    at += count;
  }
  return absl::OkStatus();
}

// The dataset with its storage, without attributes.
absl::StatusOr<Handle> Builder::Create(const Hdf5ViewDataset& dataset) {
  const bool is_virtual =
      dataset.storage == Hdf5Storage::kDatasets || dataset.storage == Hdf5Storage::kParts;
  CHECK(!is_virtual || dataset.order == Hdf5Order::kLittle);
  ASSIGN_OR_RETURN(const TypeAndFill* type, TypeOf(dataset.dtype, dataset.order));
  ASSIGN_OR_RETURN(const Handle properties, PropertiesOf(is_virtual ? type : nullptr));
  const Handle space = hdf5::MakeSpace(dataset.shape);
  if (!space.ok()) return hdf5::Error(absl::StrCat("make the shape of ", dataset.name));
  CHECK(dataset.storage != Hdf5Storage::kRanges || dataset.sources.size() <= kHdf5RangesMax);
  for (const Hdf5ViewSource& source : dataset.sources) {
    if (is_virtual) {
      RETURN_IF_ERROR(AddSource(dataset, source, properties.get(), space.get()));
    } else if (H5Pset_external(properties.get(), source.file.c_str(),
                               static_cast<off_t>(source.offset_bytes), source.bytes) < 0) {
      return hdf5::Error(absl::StrCat("name ", source.file, " for ", dataset.name));
    }
  }
  if (H5Sselect_all(space.get()) < 0) return hdf5::Error("select all");
  Handle handle(H5Dcreate2(groups_[dataset.group].get(), dataset.name.c_str(), type->type.get(),
                           space.get(), H5P_DEFAULT, properties.get(), H5P_DEFAULT),
                H5Dclose);
  if (!handle.ok()) return hdf5::Error(absl::StrCat("create dataset ", dataset.name));
  if (dataset.storage == Hdf5Storage::kInside &&
      H5Dwrite(handle.get(), type->type.get(), H5S_ALL, H5S_ALL, H5P_DEFAULT,
               dataset.bytes.data()) < 0) {
    return hdf5::Error(absl::StrCat("write dataset ", dataset.name));
  }
  return handle;
}

absl::Status Builder::CreateText(const Hdf5ViewDataset& dataset) {
  const Handle type = hdf5::MakeTextType(dataset.text.size());
  const Handle space = hdf5::MakeSpace({});
  ASSIGN_OR_RETURN(const Handle properties, PropertiesOf(nullptr));
  if (!type.ok() || !space.ok()) return hdf5::Error(absl::StrCat("make a type for ", dataset.name));
  Handle handle(H5Dcreate2(groups_[dataset.group].get(), dataset.name.c_str(), type.get(),
                           space.get(), H5P_DEFAULT, properties.get(), H5P_DEFAULT),
                H5Dclose);
  if (!handle.ok() ||
      H5Dwrite(handle.get(), type.get(), H5S_ALL, H5S_ALL, H5P_DEFAULT, dataset.text.data()) < 0 ||
      !handle.Close()) {
    return hdf5::Error(absl::StrCat("write dataset ", dataset.name));
  }
  return absl::OkStatus();
}

absl::Status Builder::CreateDataset(const Hdf5ViewDataset& dataset) {
  CHECK(dataset.group < groups_.size());
  if (!dataset.text.empty()) return CreateText(dataset);
  ASSIGN_OR_RETURN(Handle handle, Create(dataset));
  for (const Hdf5Attribute& attribute : dataset.attributes) {
    RETURN_IF_ERROR(hdf5::WriteAttribute(handle.get(), attribute));
  }
  if (!handle.Close()) return hdf5::Error(absl::StrCat("close dataset ", dataset.name));
  return absl::OkStatus();
}

absl::Status Builder::CheckSize() const {
  hsize_t bytes = 0;
  if (H5Fget_filesize(file_.get(), &bytes) < 0) return hdf5::Error("get the file's size");
  if (bytes <= plan_.bytes_max) return absl::OkStatus();
  return absl::ResourceExhaustedError(
      absl::StrFormat("view of %d datasets: expected at most %d bytes of HDF5 metadata, found more",
                      plan_.dataset_count, plan_.bytes_max));
}

absl::StatusOr<std::vector<std::byte>> Builder::Run() {
  RETURN_IF_ERROR(CreateFile());
  ASSIGN_OR_RETURN(groups_, hdf5::CreateGroups(file_.get(), plan_.groups));
  for (size_t i = 0; i < plan_.dataset_count; ++i) {
    RETURN_IF_ERROR(CreateDataset(plan_.dataset(i)));
    RETURN_IF_ERROR(CheckSize());
  }
  groups_.clear();
  types_.clear();
  if (H5Fflush(file_.get(), H5F_SCOPE_LOCAL) < 0) return hdf5::Error("flush the file");
  const ssize_t bytes = H5Fget_file_image(file_.get(), nullptr, 0);
  if (bytes < 0) return hdf5::Error("get the file's size");
  std::vector<std::byte> image(static_cast<size_t>(bytes));
  if (H5Fget_file_image(file_.get(), image.data(), image.size()) != bytes) {
    return hdf5::Error("get the file's bytes");
  }
  if (!file_.Close()) return hdf5::Error("close the file");
  return image;
}

}  // namespace

absl::StatusOr<std::vector<std::byte>> BuildHdf5View(const Hdf5ViewPlan& plan) {
  CHECK(!plan.groups.empty() && plan.groups[0].path == "/");
  CHECK(plan.parts_group < plan.groups.size());
  hdf5::Prepare();
  return Builder(plan).Run();
}

}  // namespace holdfast
