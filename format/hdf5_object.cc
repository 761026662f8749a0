#include "format/hdf5_object.h"

#include <algorithm>
#include <optional>
#include <string_view>
#include <variant>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace holdfast {

bool HasHdf5Order(Dtype dtype) {
  switch (dtype) {
    case Dtype::kBool:
    case Dtype::kUint8:
    case Dtype::kInt8:
    case Dtype::kUint16:
    case Dtype::kInt16:
    case Dtype::kUint32:
    case Dtype::kInt32:
    case Dtype::kUint64:
    case Dtype::kInt64:
    case Dtype::kFloat16:
    case Dtype::kBfloat16:
    case Dtype::kFloat32:
    case Dtype::kFloat64:
    case Dtype::kFloat8E5m2:
    case Dtype::kComplex64:
    case Dtype::kComplex128:
      return true;
    case Dtype::kFloat8E4m3fn:
    case Dtype::kFloat8E4m3fnuz:
    case Dtype::kFloat8E5m2fnuz:
    case Dtype::kFloat8E8m0fnu:
    case Dtype::kFloat4E2m1fnX2:
    case Dtype::kComplex32:
    case Dtype::kBits8:
    case Dtype::kBits16:
    case Dtype::kBits1x8:
    case Dtype::kBits2x4:
    case Dtype::kBits4x2:
      break;
  }
  return false;
}

namespace hdf5 {
namespace {

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

}  // namespace

void Prepare() {
  // A scratch file whose close failed (a full disk) would be closed once more when the process
  // ends, through a null pointer (seen in H5F__close_cb of 1.10.8). Must come before any other
  // call.
  static const bool kNoExitHandler = H5dont_atexit() >= 0;
  static_cast<void>(kNoExitHandler);
  // Errors come back as statuses; libhdf5 must not print them as well (the setting is per thread).
  static_cast<void>(H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr));
}

absl::Status Error(const std::string& what) {
  return absl::InternalError(absl::StrCat("HDF5: cannot ", what, ": ", TakeErrorText()));
}

// bool is h5py's enumeration, read as numpy bool. bfloat16 and float8_e5m2 are IEEE-like, so HDF5
// can be told and converts them. float8_e4m3fn is not (no infinity, one NaN): as a custom float 448
// would read as NaN, so it is opaque bytes (with an empty tag: h5py cannot read others). So are all
// others of which HDF5 has no idea. Complex numbers are h5py's compound of `r` and `i`, which it
// does not read of two float16.
Handle MakeType(Dtype dtype, Hdf5Order order) {
  const bool big = order == Hdf5Order::kBig;
  if (big && !HasHdf5Order(dtype)) return {};
  const auto copy = [big](hid_t little) {
    Handle type(H5Tcopy(little), H5Tclose);
    if (!type.ok() || (big && H5Tset_order(type.get(), H5T_ORDER_BE) < 0)) return Handle();
    return type;
  };
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
    case Dtype::kComplex64:
    case Dtype::kComplex128: {
      const Handle part =
          MakeType(dtype == Dtype::kComplex64 ? Dtype::kFloat32 : Dtype::kFloat64, order);
      const size_t bytes = ElementBytes(dtype);
      Handle type(H5Tcreate(H5T_COMPOUND, bytes), H5Tclose);
      if (!part.ok() || !type.ok() || H5Tinsert(type.get(), "r", 0, part.get()) < 0 ||
          H5Tinsert(type.get(), "i", bytes / 2, part.get()) < 0) {
        return {};
      }
      return type;
    }
    case Dtype::kFloat8E4m3fn:
    case Dtype::kFloat8E4m3fnuz:
    case Dtype::kFloat8E5m2fnuz:
    case Dtype::kFloat8E8m0fnu:
    case Dtype::kFloat4E2m1fnX2:
    case Dtype::kComplex32:
    case Dtype::kBits8:
    case Dtype::kBits16:
    case Dtype::kBits1x8:
    case Dtype::kBits2x4:
    case Dtype::kBits4x2: {
      Handle type(H5Tcreate(H5T_OPAQUE, ElementBytes(dtype)), H5Tclose);
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

Handle MakeSpace(std::span<const uint64_t> extents) {
  if (extents.empty()) return Handle(H5Screate(H5S_SCALAR), H5Sclose);
  const std::vector<hsize_t> dims(extents.begin(), extents.end());
  return Handle(H5Screate_simple(static_cast<int>(dims.size()), dims.data(), nullptr), H5Sclose);
}

absl::Status WriteAttribute(hid_t object, const Hdf5Attribute& attribute) {
  Handle text_type;
  std::vector<uint64_t> extents;  // none: a scalar
  hid_t type = H5T_STD_U64LE;
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
    extents = {numbers.size()};
    value = numbers.data();
    if (numbers.empty()) value = &extents[0];  // HDF5 refuses a null pointer even to no elements
  }
  const Handle space = MakeSpace(extents);
  Handle handle(H5Acreate2(object, attribute.name, type, space.get(), H5P_DEFAULT, H5P_DEFAULT),
                H5Aclose);
  if (!handle.ok() || H5Awrite(handle.get(), type, value) < 0 || !handle.Close()) {
    return Error(absl::StrCat("write attribute ", attribute.name));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<Handle>> CreateGroups(hid_t file, const std::vector<Hdf5Group>& groups) {
  std::vector<Handle> created;
  for (const Hdf5Group& group : groups) {
    const Handle creation(H5Pcreate(H5P_GROUP_CREATE), H5Pclose);
    // Names in a heap that must grow are copied again and again, and leave holes in the head.
    const uint64_t heap_bytes = std::min<uint64_t>(group.names_bytes_hint, UINT32_MAX);
    if (!creation.ok() || H5Pset_obj_track_times(creation.get(), false) < 0 ||
        H5Pset_local_heap_size_hint(creation.get(), heap_bytes) < 0) {
      return Error("set group properties");
    }
    created.push_back(group.path == "/" ? Handle(H5Gopen2(file, "/", H5P_DEFAULT), H5Gclose)
                                        : Handle(H5Gcreate2(file, group.path.c_str(), H5P_DEFAULT,
                                                            creation.get(), H5P_DEFAULT),
                                                 H5Gclose));
    if (!created.back().ok()) return Error(absl::StrCat("create group ", group.path));
    for (const Hdf5Attribute& attribute : group.attributes) {
      RETURN_IF_ERROR(WriteAttribute(created.back().get(), attribute));
    }
  }
  return created;
}

}  // namespace hdf5
}  // namespace holdfast
