#include "converter/conversion_source.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "base/status_macros.h"
#include "converter/rounding.h"

namespace holdfast::converter {

ConversionSource::ConversionSource(const ForeignFolder& folder, Selection selection)
    : stored_(std::move(selection.index)), tensors_(folder, stored_), extents_(folder, stored_) {
  CHECK(selection.dtypes.size() == stored_.tensor_states.size());
  bool casts = false;
  for (size_t i = 0; i < selection.dtypes.size(); ++i) {
    casts |= selection.dtypes[i] != stored_.tensor_states[i].dtype;
  }
  if (!casts) return;
  written_.emplace();
  written_->format = stored_.format;
  written_->variant = stored_.variant;
  written_->has_step = stored_.has_step;
  written_->step = stored_.step;
  written_->layout = stored_.layout;
  written_->files = stored_.files;
  written_->extents = stored_.extents;
  written_->tensor_states = stored_.tensor_states;
  written_->aliases = stored_.aliases;
  written_->scalars = stored_.scalars;
  written_->blobs = stored_.blobs;
  for (size_t i = 0; i < selection.dtypes.size(); ++i) {
    written_->tensor_states[i].dtype = selection.dtypes[i];
  }
}

ConversionSource::ConversionSource(const ForeignFolder& folder, ForeignIndex index)
    : stored_(std::move(index)), tensors_(folder, stored_), extents_(folder, stored_) {}

void ConversionSource::set_window_bytes(uint64_t bytes) { window_bytes_ = bytes; }

absl::Status ConversionSource::Read(uint32_t tensor_state, const Sink& sink) {
  const TensorState& state = index().tensor_states[tensor_state];
  return ReadElements(tensor_state, 0, state.ElementCount(), state.dtype, sink);
}

absl::Status ConversionSource::ReadElements(uint32_t tensor_state, uint64_t begin, uint64_t end,
                                            Dtype dtype, const Sink& sink) {
  CHECK(tensor_state < stored_.tensor_states.size());
  const Dtype stored = stored_.tensor_states[tensor_state].dtype;
  const Dtype written = index().tensor_states[tensor_state].dtype;
  const uint64_t stored_bytes = ElementBytes(stored);
  // Casts may widen; what is written fits the window too.
  const uint64_t widest = std::max({stored_bytes, ElementBytes(written), ElementBytes(dtype)});
  const uint64_t step = std::max<uint64_t>(window_bytes_ / widest, 1);
  for (uint64_t at = begin; at < end; at += step) {
    const uint64_t count = std::min(step, end - at);
    window_.resize(count * stored_bytes);
    RETURN_IF_ERROR(tensors_.ReadRange(tensor_state, at, at + count, window_));
    std::span<const std::byte> bytes = window_;
    if (stored != written) {
      Cast(tensor_state, stored, written, bytes, cast_);
      bytes = cast_;
    }
    if (written != dtype) {
      Cast(tensor_state, written, dtype, bytes, cast_again_);
      bytes = cast_again_;
    }
    RETURN_IF_ERROR(sink(bytes));
  }
  return absl::OkStatus();
}

void ConversionSource::Cast(uint32_t tensor_state, Dtype from, Dtype to,
                            std::span<const std::byte> in, std::vector<std::byte>& out) {
  out.resize(in.size() / ElementBytes(from) * ElementBytes(to));
  const uint64_t infinite = CastElements(from, to, in, out);
  if (infinite > 0 && became_infinite_ == 0) {
    first_infinite_ = Describe(stored_.tensor_states[tensor_state]);
  }
  became_infinite_ += infinite;
}

absl::Status ConversionSource::ReadBlob(uint32_t blob, const Sink& sink) {
  CHECK(blob < stored_.blobs.size());
  const uint32_t extent = stored_.blobs[blob].extent;
  const uint64_t bytes = stored_.extents[extent].decoded_bytes;
  for (uint64_t at = 0; at < bytes; at += window_.size()) {
    window_.resize(std::min(window_bytes_, bytes - at));
    RETURN_IF_ERROR(extents_.Read(extent, at, window_));
    RETURN_IF_ERROR(sink(window_));
  }
  return absl::OkStatus();
}

}  // namespace holdfast::converter
