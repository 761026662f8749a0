// What is read of DCP metadata is sound in itself, and can be written again and then reads the
// same.
#include <algorithm>
#include <string>
#include <utility>

#include "base/check.h"
#include "converter/dcp_encoding.h"
#include "converter/dcp_metadata.h"
#include "tests/fuzz/targets.h"

namespace holdfast::fuzz {
namespace {

using converter::DcpMetadata;
using converter::DcpTensor;

void CheckSound(const DcpMetadata& metadata) {
  CHECK(!metadata.transforms.empty() && metadata.transforms[0].empty());
  for (const converter::DcpItem& item : metadata.items) {
    CHECK(item.file < metadata.files.size() && item.transforms < metadata.transforms.size());
  }
  for (const DcpTensor& tensor : metadata.tensors) {
    CHECK(tensor.chunks_begin <= tensor.chunks_end && tensor.chunks_end <= metadata.chunks.size());
    for (size_t c = tensor.chunks_begin; c < tensor.chunks_end; ++c) {
      const converter::DcpChunk& chunk = metadata.chunks[c];
      CHECK(chunk.item == converter::kNoItem || chunk.item < metadata.items.size());
      const auto offsets = metadata.OffsetsOf(tensor, chunk);
      const auto sizes = metadata.SizesOf(tensor, chunk);
      for (size_t d = 0; d < tensor.shape.size(); ++d) {
        CHECK(sizes[d] <= tensor.shape[d] && offsets[d] <= tensor.shape[d] - sizes[d]);
      }
    }
  }
}

// What two tensors have in common whichever way their items are numbered.
bool SameTensor(const DcpMetadata& a, const DcpTensor& of_a, const DcpMetadata& b,
                const DcpTensor& of_b) {
  if (of_a.key != of_b.key || of_a.dtype != of_b.dtype || of_a.shape != of_b.shape ||
      of_a.path != of_b.path || of_a.requires_grad != of_b.requires_grad ||
      of_a.chunks_end - of_a.chunks_begin != of_b.chunks_end - of_b.chunks_begin) {
    return false;
  }
  for (size_t c = 0; c < of_a.chunks_end - of_a.chunks_begin; ++c) {
    const converter::DcpChunk& chunk_a = a.chunks[of_a.chunks_begin + c];
    const converter::DcpChunk& chunk_b = b.chunks[of_b.chunks_begin + c];
    if (!std::ranges::equal(a.OffsetsOf(of_a, chunk_a), b.OffsetsOf(of_b, chunk_b)) ||
        !std::ranges::equal(a.SizesOf(of_a, chunk_a), b.SizesOf(of_b, chunk_b))) {
      return false;
    }
  }
  return true;
}

}  // namespace

bool FuzzDcpMetadata(Input input) {
  const auto metadata =
      converter::ParseDcpMetadata(std::string(input.begin(), input.end()), ".metadata");
  if (!metadata.ok()) return false;
  CheckSound(*metadata);
  const auto again =
      converter::ParseDcpMetadata(converter::EncodeDcpMetadata(*metadata), ".metadata");
  CHECK_OK(again.status());
  CheckSound(*again);
  CHECK(again->tensors.size() == metadata->tensors.size());
  CHECK(again->objects.size() == metadata->objects.size());
  for (size_t i = 0; i < metadata->tensors.size(); ++i) {
    CHECK(SameTensor(*metadata, metadata->tensors[i], *again, again->tensors[i]));
  }
  return true;
}

}  // namespace holdfast::fuzz
