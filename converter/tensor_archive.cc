#include "converter/tensor_archive.h"

#include <utility>

#include "base/check.h"
#include "converter/shard_map.h"
#include "converter/torch_pickle.h"
#include "format/tensor_piece.h"

namespace holdfast::converter {
namespace {

std::string PickleOf(Dtype dtype, std::span<const uint64_t> shape) {
  TorchPickle pickle;
  pickle.Tensor(dtype, shape, {.storage = 0, .storage_elements = Product(shape), .offset = 0});
  return std::move(pickle).Finish();
}

}  // namespace

TensorArchive::TensorArchive(Dtype dtype, std::span<const uint64_t> shape)
    : data_bytes_(Product(shape) * ElementBytes(dtype)), archive_(PickleOf(dtype, shape)) {
  CHECK(data_bytes_ <= kTensorBytesMax);
  head_ = archive_.BeginStorage(data_bytes_);
}

std::string TensorArchive::Tail(uint32_t data_crc32) const {
  TorchArchive archive = archive_;
  const std::string descriptor = archive.EndStorage(data_crc32);
  return descriptor + archive.Finish();
}

}  // namespace holdfast::converter
