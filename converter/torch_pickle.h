// The data.pkl of a torch file that is being made: a pickle (base/pickle_writer.h) in which tensors
// refer to storages by number.
#ifndef HOLDFAST_CONVERTER_TORCH_PICKLE_H_
#define HOLDFAST_CONVERTER_TORCH_PICKLE_H_

#include <cstdint>
#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/pickle_writer.h"
#include "format/dtype.h"

namespace holdfast::converter {

// What torch's classes take: each call pushes one value.
//
// Threads: one. Lifetime: owns everything.
class TorchPickle {
 public:
  // For plain values; what torch's own are made of is below.
  PickleWriter& out() { return out_; }

  // A call of _rebuild_tensor_v2, or v3 for dtypes without a storage of their own. Contiguous, the
  // first element is number `offset` of the storage, which has `storage_elements`.
  struct View {
    uint32_t storage = 0;
    uint64_t storage_elements = 0;
    uint64_t offset = 0;
  };
  void Tensor(Dtype dtype, std::span<const uint64_t> shape, const View& view,
              bool requires_grad = false);
  void Size(std::span<const uint64_t> shape);                   // torch.Size
  void Tuple(std::span<const uint64_t> numbers);                // of integers
  void Strides(std::span<const uint64_t> shape);                // of a contiguous tensor: a tuple
  void Ints(std::span<const uint64_t> numbers);                 // a list
  void Object(std::string_view module, std::string_view name);  // as its __new__ makes it

  // `items` pushes keys and values by turns.
  void Dict(const std::function<void()>& items);
  void OrderedDict(const std::function<void()>& items);
  void List(const std::function<void()>& items);
  // The state of the object before it (BUILD with a dict).
  void State(const std::function<void()>& items);

  // A JSON value as Python's json would read it, but lists as `sequences`. Integers beyond 64 bits
  // are floats.
  enum class Sequences { kLists, kTuples };
  void Json(const nlohmann::ordered_json& value, Sequences sequences);

  std::string Finish() && { return std::move(out_).Finish(); }

 private:
  PickleWriter out_;
};

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_TORCH_PICKLE_H_
