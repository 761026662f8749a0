// zstd, in both directions, as a stream: the only place that includes its headers (tidy_test).
#ifndef HOLDFAST_BASE_ZSTD_CODEC_H_
#define HOLDFAST_BASE_ZSTD_CODEC_H_

#include <cstddef>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace holdfast {

// One zstd frame, made piece by piece.
//
// Threads: one.
class ZstdCompressor {
 public:
  ZstdCompressor();
  ~ZstdCompressor();
  ZstdCompressor(const ZstdCompressor&) = delete;
  ZstdCompressor& operator=(const ZstdCompressor&) = delete;

  // Appends to `out` all that makes `data`, and everything before it, readable.
  void Compress(std::string_view data, std::string& out);
  // The end of the frame. Nothing may follow.
  void Finish(std::string& out);

 private:
  struct State;
  const std::unique_ptr<State> state_;
};

// Threads: one. Lifetime: the bytes given to the constructor outlive it. Memory: 8 MiB and a bit,
// whatever the bytes say.
class ZstdDecompressor {
 public:
  explicit ZstdDecompressor(std::string_view bytes);
  // `more` gives the next bytes, none at their end. They stay until it is called again. Its errors
  // are Read's.
  explicit ZstdDecompressor(std::function<absl::StatusOr<std::string_view>()> more);
  ~ZstdDecompressor();
  ZstdDecompressor(const ZstdDecompressor&) = delete;
  ZstdDecompressor& operator=(const ZstdDecompressor&) = delete;

  // Fills `out` as far as there is something; `*count` says how far. Less than all of it: the bytes
  // end here, whole if ended(). kDataLoss: not zstd, damaged, or a window above 8 MiB.
  absl::Status Read(std::span<char> out, size_t* count);
  // The frame's end has been read, and it was the end of the bytes.
  bool ended() const;

 private:
  struct State;
  const std::unique_ptr<State> state_;
};

}  // namespace holdfast

#endif  // HOLDFAST_BASE_ZSTD_CODEC_H_
