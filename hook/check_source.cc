#include "hook/check_source.h"

#include <algorithm>

#include "hook/op_pieces.h"

namespace holdfast::hook {
namespace {

constexpr uint64_t kComparePieceBytes = uint64_t{1} << 20;

}  // namespace

Error SourceChecker::Check(const Registration& registration, uint32_t slot,
                           Registration::Memory memory, uint64_t groups,
                           const ComparerOf& comparer_of) {
  if (mode_ == CheckSource::kNone) return Error();
  const Scope scope = {registration, slot, memory, comparer_of};
  const auto ops_of = [&](uint64_t mask) -> const Registration::GroupOps& {
    return registration.group_ops(memory, static_cast<uint32_t>(__builtin_ctzll(mask)));
  };
  uint64_t total_bytes = 0;
  for (uint64_t rest = groups; rest != 0; rest &= rest - 1) total_bytes += ops_of(rest).bytes;
  if (mode_ == CheckSource::kAll || total_bytes <= kSampleChunks * kSampleChunkBytes) {
    return CheckAll(scope, groups);
  }
  for (uint32_t chunk = 0; chunk < kSampleChunks; ++chunk) {
    // The bias of the remainder is below total_bytes / 2^64.
    uint64_t at = Random() % total_bytes;
    uint64_t rest = groups;
    while (at >= ops_of(rest).bytes) {
      at -= ops_of(rest).bytes;
      rest &= rest - 1;
    }
    const Registration::GroupOps& drawn = ops_of(rest);
    const auto after = std::upper_bound(drawn.bytes_before.begin(), drawn.bytes_before.end(), at);
    const size_t index = static_cast<size_t>(after - drawn.bytes_before.begin()) - 1;
    const abi::CaptureOp& op = registration.ops()[drawn.ops[index]];
    const uint64_t begin = at - drawn.bytes_before[index];
    const uint64_t end = std::min(begin + kSampleChunkBytes, OpBytes(op));
    if (Error error = CheckOp(scope, op, begin, end); !error.ok()) return error;
  }
  return Error();
}

Error SourceChecker::CheckAll(const Scope& scope, uint64_t groups) {
  for (uint64_t rest = groups; rest != 0; rest &= rest - 1) {
    const uint32_t group = static_cast<uint32_t>(__builtin_ctzll(rest));
    for (const uint32_t index : scope.registration.group_ops(scope.memory, group).ops) {
      const abi::CaptureOp& op = scope.registration.ops()[index];
      if (Error error = CheckOp(scope, op, 0, OpBytes(op)); !error.ok()) return error;
    }
  }
  return Error();
}

// Compares bytes [begin, end) of the operation's, block by block.
Error SourceChecker::CheckOp(const Scope& scope, const abi::CaptureOp& op, uint64_t begin,
                             uint64_t end) {
  const Registration& registration = scope.registration;
  const Document::Buffer& buffer = registration.document().buffers()[op.buffer_index];
  SourceComparer& comparer = scope.comparer_of(buffer.place);
  const std::byte* const source =
      static_cast<const std::byte*>(registration.pointers()[op.buffer_index]);
  const uint64_t block_bytes = registration.block_bytes();
  while (begin < end) {
    const uint64_t image_offset = op.image_offset + begin;
    const uint64_t block = image_offset / block_bytes;
    const uint64_t block_begin = block * block_bytes;
    const uint64_t piece_end = std::min(end, begin + (block_begin + block_bytes - image_offset));
    const std::byte* const data = registration.BlockData(scope.slot, static_cast<uint32_t>(block));
    if (data == nullptr) return Error(HF_ABORTED, "the agent's block table changed under capture");
    uint64_t at = 0;
    Result<bool> equal = true;
    ForEachPiece(op, begin, piece_end, kComparePieceBytes, [&](const Piece& piece) {
      at = piece.buffer_offset;
      equal =
          comparer.Equal(data + (op.image_offset + piece.image_skip - block_begin),
                         source + piece.buffer_offset, piece.run_bytes, piece.count, piece.stride);
      return equal.ok() && equal.value();
    });
    if (!equal.ok()) {
      return Error(equal.error().code(), "comparing buffer '%s': %s", ShortName(buffer.name).text(),
                   equal.error().text());
    }
    if (!equal.value()) {
      return Error(HF_ABORTED,
                   "buffer '%s' changed under capture, at or behind its byte %llu: it must not be "
                   "changed between hf_save and the return of hf_wait_captured",
                   ShortName(buffer.name).text(), static_cast<unsigned long long>(at));
    }
    begin = piece_end;
  }
  return Error();
}

// splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
uint64_t SourceChecker::Random() {
  uint64_t z = (random_state_ += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

}  // namespace holdfast::hook
