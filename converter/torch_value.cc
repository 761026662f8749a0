// The tree of a TorchFile, as its readers see it.
#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "converter/torch_file.h"

namespace holdfast::converter {
namespace {

using Type = PickleValue::Type;

bool IsGetattr(PickleValue callee) {
  return callee.IsGlobal("builtins", "getattr") || callee.IsGlobal("__builtin__", "getattr");
}

// The object, or getattr(class, 'NAME'), as that class's attribute.
bool IsAttributeOfClass(PickleValue value) {
  return value.Is(Type::kObject) && IsGetattr(value.callee()) && *value.args().ArraySize() == 2 &&
         value.args()[0].Is(Type::kGlobal) && value.args()[1].Is(Type::kString);
}

// ('module', class, file of its source, its source) of a legacy file: the class.
PickleValue ClassOfModuleId(PickleValue value) {
  const PickleValue id = value.persistent_id();
  const bool is_module = id.Is(Type::kTuple) && *id.ArraySize() >= 2 && id[0].Is(Type::kString) &&
                         *id[0].String() == "module";
  return is_module ? id[1] : PickleValue();
}

// "module.name" of a class or function; "" if it is the result of something unknown.
std::string NameOf(PickleValue callee) {
  if (callee.Is(Type::kPersistent)) callee = ClassOfModuleId(callee);
  std::string suffix;
  if (IsAttributeOfClass(callee)) {
    suffix = absl::StrCat(".", std::string(*callee.args()[1].String()));
    callee = callee.args()[0];
  }
  if (!callee.Is(Type::kGlobal)) return "";
  return absl::StrCat(std::string(callee.module()), ".", std::string(callee.name()), suffix);
}

// _rebuild_from_type_v2(torch._utils._rebuild_wrapper_subclass, class, args, state).
bool IsWrapper(PickleValue value) {
  return value.IsCallOf("torch._tensor", "_rebuild_from_type_v2") &&
         *value.args().ArraySize() == 4 &&
         value.args()[0].IsGlobal("torch._utils", "_rebuild_wrapper_subclass") &&
         value.args()[2].Is(Type::kTuple);
}

}  // namespace

uint64_t TorchTensor::ElementCount() const {
  uint64_t count = 1;
  for (const uint64_t size : shape) {
    if (size == 0) return 0;
    count *= size;  // checked when the file was opened
  }
  return count;
}

bool TorchTensor::IsContiguous() const {
  if (ElementCount() == 0) return true;
  uint64_t expected = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    if (shape[i] == 1) continue;
    if (strides[i] != expected) return false;
    expected *= shape[i];
  }
  return true;
}

const TorchFile::Meaning* TorchFile::MeaningOf(PickleValue value) const {
  if (!value.Is(Type::kObject)) return nullptr;
  const auto found = meanings_.find(value.number());
  return found == meanings_.end() ? nullptr : &found->second;
}

std::map<std::string, uint64_t> TorchFile::OpaqueClasses() const {
  std::map<std::string, uint64_t> classes;
  document_->Walk([&](PickleValue value) {
    const Meaning* const meaning = MeaningOf(value);
    if (value.Is(Type::kObject) &&
        (meaning == nullptr || meaning->kind == TorchValue::Kind::kOpaque)) {
      const std::string name = TorchValue(this, value).ClassName();
      ++classes[name.empty() ? "(the result of a call)" : name];
    }
    return PickleDocument::Step::kInto;
  });
  return classes;
}

TorchValue TorchValue::Same(PickleValue value) const {
  return value.present() ? TorchValue(file_, value) : TorchValue();
}

PickleValue TorchValue::Opaque() const {
  if (!present()) return {};
  PickleValue value = value_;
  // Parameters of parameters end at the first object: arguments have smaller numbers.
  for (const TorchFile::Meaning* meaning = file_->MeaningOf(value);
       meaning != nullptr && meaning->kind == Kind::kOpaque && meaning->value.present();
       meaning = file_->MeaningOf(value)) {
    value = meaning->value;
  }
  return value;
}

TorchValue::Kind TorchValue::kind() const {
  CHECK(present());
  if (const TorchFile::Meaning* const meaning = file_->MeaningOf(value_); meaning != nullptr) {
    return meaning->kind;
  }
  switch (value_.type()) {
    case Type::kNone:
      return Kind::kNone;
    case Type::kBool:
      return Kind::kBool;
    case Type::kInteger:
    case Type::kBigInteger:
      return Kind::kInteger;
    case Type::kFloat:
      return Kind::kFloat;
    case Type::kString:
      return Kind::kString;
    case Type::kBytes:
    case Type::kByteArray:
      return Kind::kBytes;
    case Type::kList:
      return Kind::kList;
    case Type::kTuple:
      return Kind::kTuple;
    case Type::kSet:
    case Type::kFrozenSet:
      return Kind::kSet;
    case Type::kDict:
      return Kind::kDict;
    case Type::kGlobal:
      return value_.module() == "torch" && DtypeFromName(value_.name()).has_value() ? Kind::kDtype
                                                                                    : Kind::kOpaque;
    case Type::kObject:
    case Type::kPersistent:
      return Kind::kOpaque;
  }
  return Kind::kOpaque;
}

std::string TorchValue::Describe() const {
  if (!present()) return "nothing";
  switch (kind()) {
    case Kind::kTensor:
      return "a tensor";
    case Kind::kDict:
      return "a dict";
    case Kind::kList:
      return "a list";
    case Kind::kTuple:
      return "a tuple";
    case Kind::kSet:
      return "a set";
    case Kind::kBytes:
      return "bytes";
    default:
      break;
  }
  if (const std::string name = ClassName(); !name.empty()) {
    return absl::StrCat(Opaque().Is(Type::kGlobal) ? "the global " : "an object of ",
                        name.substr(0, 200));
  }
  return value_.Describe();
}

absl::Status TorchValue::Mismatch(std::string_view expected) const {
  const std::string text = absl::StrCat(present() ? file_->name() + ": " : "", "expected ",
                                        std::string(expected), ", found ", Describe());
  if (Is(Kind::kOpaque)) return absl::PermissionDeniedError(text);
  return absl::DataLossError(text);
}

absl::StatusOr<bool> TorchValue::Bool() const {
  if (!Is(Kind::kBool)) return Mismatch("a boolean");
  const TorchFile::Meaning* const meaning = file_->MeaningOf(value_);
  return meaning != nullptr ? meaning->integer != 0 : *value_.Bool();
}

absl::StatusOr<int64_t> TorchValue::Int64() const {
  if (!Is(Kind::kInteger) || value_.Is(Type::kBigInteger)) return Mismatch("an integer");
  const TorchFile::Meaning* const meaning = file_->MeaningOf(value_);
  return meaning != nullptr ? meaning->integer : *value_.Int64();
}

absl::StatusOr<uint64_t> TorchValue::Uint64() const {
  const absl::StatusOr<int64_t> value = Int64();
  if (!value.ok() || *value < 0) return Mismatch("an integer that is not negative");
  return static_cast<uint64_t>(*value);
}

absl::StatusOr<double> TorchValue::Double() const {
  if (Is(Kind::kInteger)) {
    ASSIGN_OR_RETURN(const int64_t value, Int64());
    return static_cast<double>(value);
  }
  if (!Is(Kind::kFloat)) return Mismatch("a number");
  const TorchFile::Meaning* const meaning = file_->MeaningOf(value_);
  return meaning != nullptr ? meaning->real : *value_.Double();
}

absl::StatusOr<std::string_view> TorchValue::String() const {
  if (!Is(Kind::kString)) return Mismatch("a string");
  return value_.String();
}

absl::StatusOr<std::string_view> TorchValue::Bytes() const {
  if (!Is(Kind::kBytes)) return Mismatch("bytes");
  const TorchFile::Meaning* const meaning = file_->MeaningOf(value_);
  return meaning != nullptr ? std::string_view(meaning->bytes) : *value_.Bytes();
}

absl::StatusOr<Dtype> TorchValue::ElementType() const {
  if (!Is(Kind::kDtype)) return Mismatch("a dtype of torch");
  return *DtypeFromName(value_.name());
}

absl::StatusOr<const TorchTensor*> TorchValue::Tensor() const {
  if (!Is(Kind::kTensor)) return Mismatch("a tensor");
  return &file_->tensors_[file_->MeaningOf(value_)->tensor];
}

// The container of the pickle that holds the contents; absent where nothing was ever put in.
PickleValue TorchValue::Contents() const {
  const TorchFile::Meaning* const meaning = file_->MeaningOf(value_);
  return meaning != nullptr ? meaning->value : value_;
}

absl::StatusOr<size_t> TorchValue::ArraySize() const {
  if (!Is(Kind::kList) && !Is(Kind::kTuple) && !Is(Kind::kSet)) return Mismatch("a list or tuple");
  const PickleValue contents = Contents();
  return contents.present() ? *contents.ArraySize() : 0;
}

TorchValue TorchValue::operator[](size_t index) const { return Same(Contents()[index]); }

absl::StatusOr<std::vector<uint64_t>> TorchValue::Uint64s() const {
  ASSIGN_OR_RETURN(const size_t count, ArraySize());
  std::vector<uint64_t> values(count);
  for (size_t i = 0; i < count; ++i) {
    ASSIGN_OR_RETURN(values[i], (*this)[i].Uint64());
  }
  return values;
}

TorchValue TorchValue::Find(std::string_view key) const {
  if (Is(Kind::kDict)) return Same(Contents().Find(key));
  if (!Is(Kind::kOpaque)) return {};
  const PickleValue object = Opaque();
  const PickleValue state = IsWrapper(object) ? object.args()[3] : object.state();
  if (state.Is(Type::kTuple) && *state.ArraySize() == 2) {  // (__dict__ or None, slots)
    const TorchValue in_dict = Same(state[0]).FindInDict(key);
    return in_dict.present() ? in_dict : Same(state[1]).FindInDict(key);
  }
  return state.Is(Type::kDict) || state.Is(Type::kObject) ? Same(state).FindInDict(key)
                                                          : TorchValue();
}

TorchValue TorchValue::FindInDict(std::string_view key) const {
  return Is(Kind::kDict) ? Find(key) : TorchValue();
}

absl::StatusOr<TorchValue> TorchValue::Get(std::string_view key) const {
  const TorchValue found = Find(key);
  if (found.present()) return found;
  if (!Is(Kind::kDict) && !Is(Kind::kOpaque)) return Mismatch("a dict");
  return absl::DataLossError(absl::StrCat(file_->name(), ": expected an entry \"", std::string(key),
                                          "\" in ", Describe()));
}

absl::StatusOr<size_t> TorchValue::EntryCount() const {
  if (!Is(Kind::kDict)) return Mismatch("a dict");
  const PickleValue contents = Contents();
  return contents.present() ? *contents.EntryCount() : 0;
}

TorchValue TorchValue::Key(size_t index) const { return Same(Contents().Key(index)); }
TorchValue TorchValue::Entry(size_t index) const { return Same(Contents().Entry(index)); }

std::string TorchValue::ClassName() const {
  const PickleValue object = Opaque();
  if (!Is(Kind::kOpaque)) return "";
  if (object.Is(Type::kGlobal)) return NameOf(object);
  if (IsAttributeOfClass(object)) return NameOf(object.args()[0]);
  if (const std::string wrapper = WrapperClass(); !wrapper.empty()) return wrapper;
  return object.Is(Type::kObject) ? NameOf(object.callee()) : "";
}

bool TorchValue::IsObject(std::string_view module, std::string_view name) const {
  if (!Is(Kind::kOpaque)) return false;
  const PickleValue object = Opaque();
  if (IsAttributeOfClass(object)) return object.args()[0].IsGlobal(module, name);
  if (object.callee().Is(Type::kPersistent)) {
    return ClassOfModuleId(object.callee()).IsGlobal(module, name);
  }
  if (IsAttributeOfClass(object.callee())) {
    return NameOf(object.callee()) == absl::StrCat(std::string(module), ".", std::string(name));
  }
  return object.IsCallOf(module, name);
}

bool TorchValue::IsGlobal(std::string_view module, std::string_view name) const {
  return present() && value_.IsGlobal(module, name);
}

TorchValue TorchValue::args() const {
  const PickleValue object = Opaque();
  return Same(IsWrapper(object) ? object.args()[2] : object.args());
}

TorchValue TorchValue::state() const {
  const PickleValue object = Opaque();
  return Same(IsWrapper(object) ? object.args()[3] : object.state());
}

TorchValue TorchValue::attributes() const {
  const TorchValue given = state();
  if (given.Is(Kind::kTuple) && *given.ArraySize() == 2) {
    return given[0].Is(Kind::kDict) ? given[0] : given[1].Is(Kind::kDict) ? given[1] : TorchValue();
  }
  return given.Is(Kind::kDict) ? given : TorchValue();
}

bool TorchValue::IsParameter() const {
  if (!present()) return false;
  const TorchFile::Meaning* const meaning = file_->MeaningOf(value_);
  return meaning != nullptr && meaning->parameter;
}

TorchValue TorchValue::EnumMember() const {
  if (!Is(Kind::kOpaque)) return {};
  const PickleValue object = Opaque();
  if (IsAttributeOfClass(object)) return Same(object.args()[1]);
  const bool is_call = object.Is(Type::kObject) &&
                       object.making() == PickleValue::Making::kReduce &&
                       !object.state().present() && *object.args().ArraySize() == 1 &&
                       object.callee().Is(Type::kGlobal);
  return is_call ? Same(object.args()[0]) : TorchValue();
}

std::string TorchValue::WrapperClass() const {
  const PickleValue object = Opaque();
  return IsWrapper(object) ? NameOf(object.args()[1]) : "";
}

TorchValue TorchValue::TensorAttribute(std::string_view name) const {
  if (!Is(Kind::kTensor)) return {};
  const PickleValue attributes = file_->MeaningOf(value_)->attributes;
  return Same(attributes).FindInDict(name);
}

}  // namespace holdfast::converter
