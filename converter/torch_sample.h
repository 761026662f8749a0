// Files of torch.save for tests: any pickle, with tensors whose storages lie beside it.
#ifndef HOLDFAST_CONVERTER_TORCH_SAMPLE_H_
#define HOLDFAST_CONVERTER_TORCH_SAMPLE_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/pickle_writer.h"
#include "converter/test_zip.h"
#include "format/dtype.h"

namespace holdfast::converter {

// The caller drives `pickle`, whose one value is the file's.
class TorchSample {
 public:
  PickleWriter pickle;

  // Of bfloat16 or float32.
  uint32_t AddStorage(Dtype dtype, std::string bytes) {
    storages_.push_back({dtype, std::move(bytes)});
    return static_cast<uint32_t>(storages_.size() - 1);
  }
  // Pushes a contiguous view.
  void Tensor(uint32_t storage, uint64_t offset, const std::vector<uint64_t>& shape) {
    const Storage& of = storages_[storage];
    pickle.Global("torch._utils", "_rebuild_tensor_v2");
    pickle.Mark();
    pickle.Mark();
    pickle.String("storage");
    pickle.Global("torch", of.dtype == Dtype::kBfloat16 ? "BFloat16Storage" : "FloatStorage");
    pickle.String(absl::StrCat(storage));
    pickle.String("cpu");
    pickle.Int(static_cast<int64_t>(of.bytes.size() / ElementBytes(of.dtype)));
    pickle.Tuple();
    pickle.PersistentId();
    pickle.Int(static_cast<int64_t>(offset));
    pickle.Mark();
    for (const uint64_t size : shape) pickle.Int(static_cast<int64_t>(size));
    pickle.Tuple();
    pickle.Mark();
    for (size_t d = 0; d < shape.size(); ++d) {
      uint64_t stride = 1;
      for (size_t inner = d + 1; inner < shape.size(); ++inner) stride *= shape[inner];
      pickle.Int(static_cast<int64_t>(stride));
    }
    pickle.Tuple();
    pickle.Bool(false);
    pickle.Global("collections", "OrderedDict");
    pickle.Tuple(0);
    pickle.Reduce();
    pickle.Tuple();
    pickle.Reduce();
  }

  // Pushes a tensor of a storage of its own.
  void Tensor(Dtype dtype, std::string bytes, const std::vector<uint64_t>& shape) {
    Tensor(AddStorage(dtype, std::move(bytes)), 0, shape);
  }

  std::string Bytes() && {
    TestZip zip;
    // Without checksums, as torch writes it if told so: then a test may change a name in the file.
    const auto add = [&zip](const std::string& name, std::string data) {
      zip.entries.push_back({.name = name, .data = std::move(data), .crc32 = 0});
    };
    add("archive/data.pkl", std::move(pickle).Finish());
    for (size_t i = 0; i < storages_.size(); ++i) {
      add(absl::StrCat("archive/data/", i), storages_[i].bytes);
    }
    add("archive/version", "3\n");
    return zip.Bytes();
  }

 private:
  struct Storage {
    Dtype dtype;
    std::string bytes;
  };
  std::vector<Storage> storages_;
};

// The entries of a dict come between this and PickleWriter::SetItems.
inline void BeginDict(PickleWriter& pickle) {
  pickle.EmptyDict();
  pickle.Mark();
}
inline void Entry(PickleWriter& pickle, std::string_view key, int64_t value) {
  pickle.String(key);
  pickle.Int(value);
}
inline void Flag(PickleWriter& pickle, std::string_view key, bool value) {
  pickle.String(key);
  pickle.Bool(value);
}

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_TORCH_SAMPLE_H_
