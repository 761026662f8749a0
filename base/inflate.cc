#include "base/inflate.h"

#include <isa-l/igzip_lib.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/str_format.h"
#include "base/status_macros.h"

namespace holdfast {

struct Inflater::State {
  More more;
  inflate_state inflate;
  bool input_ended = false;
};

Inflater::Inflater(More more) : state_(std::make_unique<State>()) {
  state_->more = std::move(more);
  isal_inflate_init(&state_->inflate);
  state_->inflate.crc_flag = ISAL_DEFLATE;
}

Inflater::~Inflater() = default;

absl::Status Inflater::Read(std::span<char> out, size_t* count) {
  inflate_state& inflate = state_->inflate;
  *count = 0;
  while (*count < out.size() && !ended()) {
    if (inflate.avail_in == 0 && !state_->input_ended) {
      ASSIGN_OR_RETURN(const std::string_view input, state_->more());
      state_->input_ended = input.empty();
      // ISA-L takes its input without const, and does not write to it.
      inflate.next_in = reinterpret_cast<uint8_t*>(const_cast<char*>(input.data()));
      inflate.avail_in = static_cast<uint32_t>(input.size());
    }
    const auto room = static_cast<uint32_t>(
        std::min<size_t>(out.size() - *count, std::numeric_limits<uint32_t>::max() / 2));
    inflate.next_out = reinterpret_cast<uint8_t*>(out.data() + *count);
    inflate.avail_out = room;
    const int result = isal_inflate(&inflate);
    *count += room - inflate.avail_out;
    if (result != ISAL_DECOMP_OK && result != ISAL_END_INPUT) {
      return absl::DataLossError(absl::StrFormat("deflate: damaged (ISA-L's error %d)", result));
    }
    if (inflate.avail_out == room && state_->input_ended) break;  // it ends inside
  }
  return absl::OkStatus();
}

bool Inflater::ended() const { return state_->inflate.block_state == ISAL_BLOCK_FINISH; }

}  // namespace holdfast
