// Cutting a capture operation at places that its runs do not know: blocks, chunks.
#ifndef HOLDFAST_HOOK_OP_PIECES_H_
#define HOLDFAST_HOOK_OP_PIECES_H_

#include <algorithm>
#include <cstdint>

#include "hook/abi/messages.h"

namespace holdfast::hook {

// `count` runs of `run_bytes` in the buffer, `stride` apart, from `buffer_offset` on; in the image
// they lie one behind the other, `image_skip` bytes behind the operation's first.
struct Piece {
  uint64_t image_skip;
  uint64_t buffer_offset;
  uint64_t run_bytes;
  uint64_t count;
  uint64_t stride;
};

// Calls `use(piece)` for pieces that together are bytes [begin, end) of the operation's, counted in
// the image, in order. Each is at most `piece_bytes_max` (> 0) bytes: part of one run, or several
// whole runs. Stops early, and returns false, if `use` returns false.
template <typename Use>
bool ForEachPiece(const abi::CaptureOp& op, uint64_t begin, uint64_t end, uint64_t piece_bytes_max,
                  const Use& use) {
  uint64_t at = begin;
  while (at < end) {
    const uint64_t run = at / op.run_bytes;
    const uint64_t in_run = at % op.run_bytes;
    Piece piece = {at, op.buffer_offset + run * op.buffer_stride + in_run, 0, 1, op.buffer_stride};
    const uint64_t whole_runs = std::min(end - at, piece_bytes_max) / op.run_bytes;
    if (in_run == 0 && whole_runs > 0) {
      piece.run_bytes = op.run_bytes;
      piece.count = whole_runs;
    } else {
      piece.run_bytes = std::min({op.run_bytes - in_run, end - at, piece_bytes_max});
    }
    if (!use(piece)) return false;
    at += piece.run_bytes * piece.count;
  }
  return true;
}

}  // namespace holdfast::hook

#endif  // HOLDFAST_HOOK_OP_PIECES_H_
