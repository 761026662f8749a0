#include "converter/torch_pickle.h"

#include <limits>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"

namespace holdfast::converter {
namespace {

struct StorageClass {
  Dtype dtype;
  std::string_view name;
};

// torch's typed storages; every other dtype is in an untyped one.
constexpr StorageClass kStorages[] = {
    {Dtype::kBool, "BoolStorage"},
    {Dtype::kUint8, "ByteStorage"},
    {Dtype::kInt8, "CharStorage"},
    {Dtype::kInt16, "ShortStorage"},
    {Dtype::kInt32, "IntStorage"},
    {Dtype::kInt64, "LongStorage"},
    {Dtype::kFloat16, "HalfStorage"},
    {Dtype::kBfloat16, "BFloat16Storage"},
    {Dtype::kFloat32, "FloatStorage"},
    {Dtype::kFloat64, "DoubleStorage"},
    {Dtype::kComplex64, "ComplexFloatStorage"},
    {Dtype::kComplex128, "ComplexDoubleStorage"},
};

}  // namespace

void TorchPickle::Tensor(Dtype dtype, std::span<const uint64_t> shape, const View& view,
                         bool requires_grad) {
  std::string_view storage;
  for (const StorageClass& known : kStorages) {
    if (known.dtype == dtype) storage = known.name;
  }
  out_.Global("torch._utils", storage.empty() ? "_rebuild_tensor_v3" : "_rebuild_tensor_v2");
  out_.Mark();
  out_.Mark();
  out_.String("storage");
  if (storage.empty()) {
    out_.Global("torch.storage", "UntypedStorage");
  } else {
    out_.Global("torch", storage);
  }
  out_.String(absl::StrCat(view.storage));
  out_.String("cpu");
  // An untyped storage counts bytes.
  out_.Int(static_cast<int64_t>(storage.empty() ? view.storage_elements * ElementBytes(dtype)
                                                : view.storage_elements));
  out_.Tuple();
  out_.PersistentId();
  out_.Int(static_cast<int64_t>(view.offset));
  Tuple(shape);
  Strides(shape);
  out_.Bool(requires_grad);
  out_.Global("collections", "OrderedDict");
  out_.Tuple(0);
  out_.Reduce();
  if (storage.empty()) out_.Global("torch", DtypeName(dtype));
  out_.Tuple();
  out_.Reduce();
}

void TorchPickle::Tuple(std::span<const uint64_t> numbers) {
  out_.Mark();
  for (const uint64_t number : numbers) out_.Int(static_cast<int64_t>(number));
  out_.Tuple();
}

void TorchPickle::Strides(std::span<const uint64_t> shape) {
  std::vector<uint64_t> strides(shape.size(), 1);
  for (size_t d = shape.size(); d-- > 1;) {
    strides[d - 1] = strides[d] * (shape[d] == 0 ? 1 : shape[d]);
  }
  Tuple(strides);
}

void TorchPickle::Size(std::span<const uint64_t> shape) {
  out_.Global("torch", "Size");
  Tuple(shape);
  out_.Tuple(1);
  out_.Reduce();
}

void TorchPickle::Ints(std::span<const uint64_t> numbers) {
  List([&] {
    for (const uint64_t number : numbers) out_.Int(static_cast<int64_t>(number));
  });
}

void TorchPickle::Object(std::string_view module, std::string_view name) {
  out_.Global(module, name);
  out_.Tuple(0);
  out_.NewObject();
}

void TorchPickle::Dict(const std::function<void()>& items) {
  out_.EmptyDict();
  out_.Mark();
  items();
  out_.SetItems();
}

void TorchPickle::OrderedDict(const std::function<void()>& items) {
  out_.Global("collections", "OrderedDict");
  out_.Tuple(0);
  out_.Reduce();
  out_.Mark();
  items();
  out_.SetItems();
}

void TorchPickle::List(const std::function<void()>& items) {
  out_.EmptyList();
  out_.Mark();
  items();
  out_.Appends();
}

void TorchPickle::State(const std::function<void()>& items) {
  Dict(items);
  out_.Build();
}

void TorchPickle::Json(const nlohmann::ordered_json& value, Sequences sequences) {
  using Type = nlohmann::ordered_json::value_t;
  switch (value.type()) {
    case Type::boolean:
      return out_.Bool(value.get<bool>());
    case Type::number_integer:
      return out_.Int(value.get<int64_t>());
    case Type::number_unsigned:
      if (value.get<uint64_t>() <= std::numeric_limits<int64_t>::max()) {
        return out_.Int(value.get<int64_t>());
      }
      return out_.Float(static_cast<double>(value.get<uint64_t>()));
    case Type::number_float:
      return out_.Float(value.get<double>());
    case Type::string:
      return out_.String(value.get_ref<const std::string&>());
    case Type::array:
      if (sequences == Sequences::kTuples) {
        out_.Mark();
        for (const auto& each : value) Json(each, sequences);
        return out_.Tuple();
      }
      return List([&] {
        for (const auto& each : value) Json(each, sequences);
      });
    case Type::object:
      return Dict([&] {
        for (const auto& [key, each] : value.items()) {
          out_.String(key);
          Json(each, sequences);
        }
      });
    default:
      return out_.None();
  }
}

}  // namespace holdfast::converter
