// Random restores of a TestAgent and what they leave in the buffers: for memory of the host and of
// devices.
#ifndef HOLDFAST_HOOK_TEST_RESTORE_H_
#define HOLDFAST_HOOK_TEST_RESTORE_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <random>
#include <utility>
#include <vector>

#include "hook/test_agent.h"
#include "hook/test_job.h"

namespace holdfast::hook {

inline std::vector<std::byte> RandomBytes(std::mt19937& random, uint64_t count) {
  std::vector<std::byte> bytes(count);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
  return bytes;
}

// A random strided operation from a piece of `source_bytes` to one of the buffers.
inline abi::RestoreOp RandomOp(std::mt19937& random, const TestBuffers& buffers,
                               uint64_t source_bytes) {
  abi::RestoreOp op = {};
  op.buffer_index = static_cast<uint32_t>(random() % buffers.count());
  const uint64_t target_bytes = buffers.data(op.buffer_index).size();
  const uint64_t smaller = std::min(source_bytes, target_bytes);
  if (smaller == 0) return op;
  op.count = 1 + random() % std::min<uint64_t>(smaller, 20);
  op.run_bytes = 1 + random() % (smaller / op.count);
  op.source_stride = op.run_bytes + random() % (source_bytes / op.count - op.run_bytes + 1);
  op.buffer_stride = op.run_bytes + random() % (target_bytes / op.count - op.run_bytes + 1);
  op.source_offset =
      random() % (source_bytes - op.source_stride * (op.count - 1) - op.run_bytes + 1);
  op.buffer_offset =
      random() % (target_bytes - op.buffer_stride * (op.count - 1) - op.run_bytes + 1);
  return op;
}

// Pieces at places of their own in the rank's memory (map 0) and `maps` - 1 others.
inline TestRestore RandomRestore(std::mt19937& random, const TestBuffers& buffers, size_t pieces,
                                 uint32_t maps) {
  TestRestore script;
  script.step = 77;
  script.attempt = 3;
  script.world_size = 4;
  std::vector<uint64_t> ends(maps);
  for (size_t i = 0; i < pieces; ++i) {
    TestRestore::Piece piece;
    piece.map_id = static_cast<uint32_t>(random() % maps);
    piece.bytes = RandomBytes(random, random() % 1500);
    piece.offset = ends[piece.map_id];
    ends[piece.map_id] += piece.bytes.size();
    for (size_t op = random() % 4; op > 0; --op) {
      piece.ops.push_back(RandomOp(random, buffers, piece.bytes.size()));
    }
    script.pieces.push_back(std::move(piece));
  }
  for (uint32_t map = 1; map < maps; ++map) script.map_bytes.push_back(ends[map] + 1);
  return script;
}

// What the buffers hold afterwards.
inline void Apply(const TestRestore& script, TestBuffers* buffers) {
  for (const TestRestore::Piece& piece : script.pieces) {
    for (const abi::RestoreOp& op : piece.ops) {
      for (uint64_t run = 0; run < op.count; ++run) {
        for (uint64_t i = 0; i < op.run_bytes; ++i) {
          buffers->data(op.buffer_index)[op.buffer_offset + run * op.buffer_stride + i] =
              piece.bytes[op.source_offset + run * op.source_stride + i];
        }
      }
    }
  }
}

}  // namespace holdfast::hook

#endif  // HOLDFAST_HOOK_TEST_RESTORE_H_
