#include "converter/extent_reader.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/inflate.h"
#include "base/status_macros.h"
#include "base/zstd_codec.h"

namespace holdfast::converter {
namespace {

constexpr size_t kDecodersMax = 8;
constexpr size_t kInputBytes = size_t{256} << 10;

}  // namespace

// One compressed extent, decoded from its beginning on.
class ExtentReader::Decoder {
 public:
  Decoder(const ForeignFolder& folder, const ForeignIndex& index, uint32_t number)
      : folder_(folder), extent_(index.extents[number]), number_(number) {
    Restart();
  }

  uint32_t number() const { return number_; }

  absl::Status Read(uint64_t offset_bytes, std::span<std::byte> out) {
    if (offset_bytes < decoded_) {
      if (++decodings_ > kDecodingsMax) {
        return absl::ResourceExhaustedError(
            absl::StrFormat("%s: the compressed stream at offset %d is read in such disorder that "
                            "it would be decoded more than %d times",
                            Name(), extent_.offset_bytes, kDecodingsMax));
      }
      Restart();
    }
    std::vector<std::byte> skipped(std::min<uint64_t>(offset_bytes - decoded_, kInputBytes));
    while (decoded_ < offset_bytes) {
      RETURN_IF_ERROR(Next(
          std::span(skipped).first(std::min<uint64_t>(offset_bytes - decoded_, skipped.size()))));
    }
    return Next(out);
  }

 private:
  const std::string& Name() const { return folder_.files()[extent_.file].path; }

  void Restart() {
    read_ = 0;
    decoded_ = 0;
    zstd_.reset();
    inflater_.reset();
    const auto more = [this]() -> absl::StatusOr<std::string_view> {
      input_.resize(std::min<uint64_t>(kInputBytes, extent_.stored_bytes - read_));
      RETURN_IF_ERROR(folder_.ReadAt(extent_.file, extent_.offset_bytes + read_,
                                     std::as_writable_bytes(std::span(input_))));
      read_ += input_.size();
      return input_;
    };
    if (extent_.codec == Codec::kZstd) {
      zstd_ = std::make_unique<ZstdDecompressor>(more);
    } else {
      inflater_ = std::make_unique<Inflater>(more);
    }
  }

  absl::Status Next(std::span<std::byte> out) {
    const std::span<char> text(reinterpret_cast<char*>(out.data()), out.size());
    size_t count = 0;
    const absl::Status status =
        zstd_ != nullptr ? zstd_->Read(text, &count) : inflater_->Read(text, &count);
    decoded_ += count;
    if (status.ok() && count == out.size()) return absl::OkStatus();
    if (status.ok() || absl::IsDataLoss(status)) {
      return absl::DataLossError(
          absl::StrFormat("%s: the compressed stream at offset %d: expected %d bytes, found %d%s%s",
                          Name(), extent_.offset_bytes, extent_.decoded_bytes, decoded_,
                          status.ok() ? "" : ": ", status.message()));
    }
    return status;
  }

  const ForeignFolder& folder_;
  const Extent extent_;
  const uint32_t number_;
  uint64_t read_ = 0;     // of the stored bytes
  uint64_t decoded_ = 0;  // where the next byte of the decoder lies
  uint64_t decodings_ = 1;
  std::string input_;
  std::unique_ptr<ZstdDecompressor> zstd_;
  std::unique_ptr<Inflater> inflater_;
};

ExtentReader::ExtentReader(const ForeignFolder& folder, const ForeignIndex& index)
    : folder_(folder), index_(index) {}
ExtentReader::~ExtentReader() = default;

absl::Status ExtentReader::Read(uint32_t extent, uint64_t offset_bytes, std::span<std::byte> out) {
  CHECK(extent < index_.extents.size());
  const Extent& where = index_.extents[extent];
  CHECK(offset_bytes <= where.decoded_bytes && out.size() <= where.decoded_bytes - offset_bytes);
  if (out.empty()) return absl::OkStatus();
  if (where.file == kInline) {
    std::memcpy(out.data(), index_.inline_bytes.data() + where.offset_bytes + offset_bytes,
                out.size());
    return absl::OkStatus();
  }
  if (where.codec != Codec::kRaw) return ReadDecoded(extent, offset_bytes, out);
  return folder_.ReadAt(where.file, where.offset_bytes + offset_bytes, out);
}

absl::Status ExtentReader::ReadDecoded(uint32_t extent, uint64_t offset_bytes,
                                       std::span<std::byte> out) {
  auto found = std::find_if(decoders_.begin(), decoders_.end(),
                            [&](const auto& decoder) { return decoder->number() == extent; });
  if (found == decoders_.end()) {
    if (decoders_.size() >= kDecodersMax) decoders_.pop_back();
    decoders_.push_front(std::make_unique<Decoder>(folder_, index_, extent));
  } else {
    decoders_.splice(decoders_.begin(), decoders_, found);
  }
  return decoders_.front()->Read(offset_bytes, out);
}

}  // namespace holdfast::converter
