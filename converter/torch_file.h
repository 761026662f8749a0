// One file of torch.save: the object that it holds, as a tree in which tensors know where their
// bytes lie, and everything that is not understood is an inert node. Nothing of the file runs.
//
// Containers: the zip of torch >= 1.6, and the five pickles of older versions (magic number
// 0x1950a86a20f9469cfc6c). TorchScript, .pt2 and the tar files of torch 0.1 are recognised and
// refused by name. What is understood is a list, by module and name (torch_rebuild.cc): the
// functions that make tensors, parameters, storages, sizes and the containers of Python's
// library. Nobody asks what else a class means: it is shown (ClassName), and its arguments and
// attributes can be looked at. Who needs a value and finds such a node gets kPermissionDenied,
// which names the class: exit code 6.
//
// Every tensor is checked when the file is opened: its storage is there, as long as the file says,
// and holds all that shape, strides and offset reach, in arithmetic that does not overflow.
// A tensor that is broken fails the file.
//
// Format: torch/serialization.py, torch/_utils.py, caffe2/serialize/inline_container.cc.
#ifndef HOLDFAST_CONVERTER_TORCH_FILE_H_
#define HOLDFAST_CONVERTER_TORCH_FILE_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/pickle_reader.h"
#include "converter/byte_source.h"
#include "format/dtype.h"

namespace holdfast::converter {

class TorchFile;

inline constexpr size_t kTorchPickleBytesMax = size_t{512} << 20;
inline constexpr size_t kTorchValuesMax = size_t{1} << 26;
inline constexpr size_t kTorchTensorsMax = size_t{1} << 21;
inline constexpr size_t kTorchNestingMax = 64;
inline constexpr size_t kTorchDimsMax = 64;

struct TorchStorage {
  std::string key;
  std::string location;  // "cpu", "cuda:3"; as it stands in the file
  uint64_t offset = 0;   // of its bytes, in the source
  uint64_t bytes = 0;
  uint32_t crc32 = 0;  // of a zip; 0: perhaps not computed
  // False: the record exists, but torch.serialization.skip_data wrote none of its bytes.
  bool written = true;
};

struct TorchTensor {
  Dtype dtype = Dtype::kFloat32;
  std::vector<uint64_t> shape;    // empty: 0-d, one element
  std::vector<uint64_t> strides;  // in elements
  uint32_t storage = 0;           // index into storages()
  uint64_t offset = 0;            // of the first element in the storage, in elements
  bool conj = false;              // the stored numbers are to be conjugated,
  bool neg = false;               // or negated
  bool parameter = false;         // torch.nn.Parameter
  bool requires_grad = false;

  uint64_t ElementCount() const;
  uint64_t Bytes() const { return ElementCount() * ElementBytes(dtype); }  // < 2^62
  bool IsContiguous() const;  // row-major, one element behind the other
};

// A value of the tree. Accessors return kDataLoss (`x.pt: expected a dict, found ...`), or
// kPermissionDenied, with the same words, of a node that is not understood.
//
// Threads: any. Lifetime: refers to its TorchFile.
class TorchValue {
 public:
  enum class Kind : uint8_t {
    kNone,
    kBool,
    kInteger,  // numpy's too
    kFloat,    // numpy's too
    kString,
    kBytes,  // bytes, bytearray, and what protocol 2 makes of them (_codecs.encode)
    kList,
    kTuple,   // torch.Size too
    kSet,     // frozenset too
    kDict,    // OrderedDict, defaultdict, Counter too
    kTensor,  // dense ones, parameters; see tensor()
    kDtype,   // torch.float32
    kOpaque,  // everything else: globals, persistent ids, objects of any class
  };

  TorchValue() = default;  // absent

  bool present() const { return file_ != nullptr; }
  Kind kind() const;  // CHECKs present()
  bool Is(Kind asked) const { return present() && kind() == asked; }

  absl::StatusOr<bool> Bool() const;
  absl::StatusOr<int64_t> Int64() const;
  absl::StatusOr<uint64_t> Uint64() const;
  absl::StatusOr<double> Double() const;  // floats and integers
  absl::StatusOr<std::string_view> String() const;
  absl::StatusOr<std::string_view> Bytes() const;
  absl::StatusOr<Dtype> ElementType() const;  // of kDtype
  absl::StatusOr<const TorchTensor*> Tensor() const;

  // Lists, tuples, sets.
  absl::StatusOr<size_t> ArraySize() const;
  TorchValue operator[](size_t index) const;  // CHECKs that this is one and index < size
  // Lists and tuples of integers that are not negative: shapes, offsets.
  absl::StatusOr<std::vector<uint64_t>> Uint64s() const;

  // Dicts; absent if there is no such entry. Of an opaque object Find is its attribute of this
  // name: see attributes(). Get is Find, and kInvalidArgument if there is none.
  TorchValue Find(std::string_view key) const;
  absl::StatusOr<TorchValue> Get(std::string_view key) const;
  absl::StatusOr<size_t> EntryCount() const;  // of a dict
  TorchValue Key(size_t index) const;         // CHECKs that this is a dict and index < count
  TorchValue Entry(size_t index) const;

  // Opaque nodes. ClassName: "argparse.Namespace"; of a global its own name, of an object that of
  // its callee; "" of anything else. IsObject compares the same without building it.
  std::string ClassName() const;
  bool IsObject(std::string_view module, std::string_view name) const;
  bool IsGlobal(std::string_view module, std::string_view name) const;
  TorchValue args() const;   // of an object: a tuple, else absent
  TorchValue state() const;  // of an object; absent where it was given none
  // What the object's __dict__ would hold (argparse.Namespace, dataclasses, ...), or its slots; a
  // dict, or absent.
  TorchValue attributes() const;
  // torch.nn.Parameter: a dense tensor, or one around a wrapper subclass (which is then looked
  // through: all other accessors see the wrapper).
  bool IsParameter() const;
  // A member of an enum, in both forms that Python's versions write: Class(value) gives the value,
  // getattr(Class, 'NAME') the name. Absent if this is neither.
  TorchValue EnumMember() const;
  // torch._tensor._rebuild_from_type_v2 of a wrapper subclass (DTensor, ShardedTensor): the class
  // as "module.name"; Find has its attributes, args() are (class, dtype, size, strides, ...). "" of
  // anything else.
  std::string WrapperClass() const;
  // What _rebuild_from_type_v2 or _rebuild_parameter_with_state attached to a dense tensor, by name
  // (`ds_id` of ZeRO-3); absent if there is none.
  TorchValue TensorAttribute(std::string_view name) const;

  // The same number for the same object: aliases. Less than the file's value_count().
  uint32_t number() const { return value_.number(); }
  PickleValue pickle() const { return value_; }
  // Another value of the same document, as it is understood.
  TorchValue Same(PickleValue value) const;
  // `a dict`, `an object of os.system`: for errors; bounded.
  std::string Describe() const;
  absl::Status Mismatch(std::string_view expected) const;

 private:
  friend class TorchFile;
  TorchValue(const TorchFile* file, PickleValue value) : file_(file), value_(value) {}

  PickleValue Opaque() const;  // what an opaque node's accessors look at
  PickleValue Contents() const;
  TorchValue FindInDict(std::string_view key) const;

  const TorchFile* file_ = nullptr;
  PickleValue value_;
};

// Threads: any, once opened. Lifetime: does not refer to the source.
class TorchFile {
 public:
  TorchFile(const TorchFile&) = delete;
  TorchFile& operator=(const TorchFile&) = delete;

  enum class Container : uint8_t { kZip, kLegacy, kPickle };

  // Whether a file that begins like this could be one of torch.save: cheap, for detection. A zip is
  // one only if its directory has <prefix>/data.pkl.
  static bool BeginsLikeTorch(std::string_view head);
  // Errors: kDataLoss (no such file, or a broken one), kUnimplemented (TorchScript, .pt2, the tar
  // of torch 0.1, a tensor of torch 0.1 to 0.3 that is a view), kPermissionDenied (an opcode that
  // could run code), kResourceExhausted (beyond a limit); those of the source. All name the source.
  static absl::StatusOr<std::unique_ptr<TorchFile>> Open(const ByteSource& source);
  // A bare pickle without storages (DCP's .metadata): the same tree. `name`: for errors.
  static absl::StatusOr<std::unique_ptr<TorchFile>> OpenPickle(std::string name, std::string bytes);

  Container container() const { return container_; }
  const std::string& name() const { return name_; }
  TorchValue root() const { return TorchValue(this, document_->root()); }
  size_t value_count() const { return document_->value_count(); }
  std::span<const TorchStorage> storages() const { return storages_; }
  std::span<const TorchTensor> tensors() const { return tensors_; }
  // Whether the stored words are big-endian.
  bool big_endian() const { return big_endian_; }
  // One sentence each, for people: data that was never written, views of much larger storages.
  std::span<const std::string> warnings() const { return warnings_; }
  // Classes of opaque objects and how many there are of each, by name: "argparse.Namespace".
  std::map<std::string, uint64_t> OpaqueClasses() const;

 private:
  friend class TorchValue;
  friend class TorchFileBuilder;
  TorchFile() = default;

  // What an object stands for.
  struct Meaning {
    TorchValue::Kind kind = TorchValue::Kind::kOpaque;
    bool parameter = false;
    uint32_t tensor = 0;     // kTensor: index into tensors_
    PickleValue value;       // containers: what they hold; kOpaque: what a parameter is around
    PickleValue attributes;  // kTensor
    int64_t integer = 0;     // kBool, kInteger
    double real = 0;         // kFloat
    std::string bytes = {};  // kBytes
  };
  const Meaning* MeaningOf(PickleValue value) const;  // null: what its type says

  Container container_ = Container::kPickle;
  std::string name_;
  std::unique_ptr<PickleDocument> document_;
  std::unordered_map<uint32_t, Meaning> meanings_;  // by number of the value
  std::vector<TorchStorage> storages_;
  std::vector<TorchTensor> tensors_;
  bool big_endian_ = false;
  std::vector<std::string> warnings_;
};

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_TORCH_FILE_H_
