// Raw deflate (RFC 1951), decoded as a stream by ISA-L: the entries of zip files.
#ifndef HOLDFAST_BASE_INFLATE_H_
#define HOLDFAST_BASE_INFLATE_H_

#include <cstddef>
#include <functional>
#include <memory>
#include <span>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace holdfast {

// Threads: one. Memory: about 100 KiB, whatever the bytes say.
class Inflater {
 public:
  // `more` gives the next bytes of the stream, none at its end. They stay until it is called again.
  using More = std::function<absl::StatusOr<std::string_view>()>;
  explicit Inflater(More more);
  ~Inflater();
  Inflater(const Inflater&) = delete;
  Inflater& operator=(const Inflater&) = delete;

  // Fills `out` as far as there is something; `*count` says how far. Less than all of it: the
  // stream or the bytes end here. Errors: kDataLoss (damaged), those of `more`.
  absl::Status Read(std::span<char> out, size_t* count);
  // The end of the stream has been read.
  bool ended() const;

 private:
  struct State;
  const std::unique_ptr<State> state_;
};

}  // namespace holdfast

#endif  // HOLDFAST_BASE_INFLATE_H_
