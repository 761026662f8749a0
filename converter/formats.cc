// The table of formats. A reader that stands before another has looked at more: whatever comes
// first and says yes, reads.
#include <algorithm>
#include <utility>

#include "base/status_macros.h"
#include "converter/dcp_reader.h"
#include "converter/deepspeed_model.h"
#include "converter/format_reader.h"
#include "converter/fsdp_reader.h"
#include "converter/hf.h"
#include "converter/megatron_reader.h"
#include "converter/safetensors.h"
#include "converter/torch_reader.h"

namespace holdfast::converter {
namespace {

constexpr FormatReader kReaders[] = {
    {"ucp", RecognizesUniversal, ReadUniversal},
    {"deepspeed", RecognizesDeepSpeed, ReadDeepSpeed},
    {"megatron", RecognizesMegatron, ReadMegatron},
    {"dcp", RecognizesDcp, ReadDcp},
    {"fsdp", RecognizesFsdp, ReadFsdp},
    {"hf", RecognizesHf, ReadHf},
    {"safetensors", RecognizesSafetensors, ReadSafetensors},
    {"torch", RecognizesTorch, ReadTorch},  // one file: whatever nobody else knows
};

}  // namespace

std::span<const FormatReader> FormatReaders() { return kReaders; }

absl::StatusOr<const FormatReader*> RecognizeFormat(const ForeignFolder& folder) {
  for (const FormatReader& reader : kReaders) {
    ASSIGN_OR_RETURN(const bool recognized, reader.recognizes(folder));
    if (recognized) return &reader;
  }
  return nullptr;
}

absl::StatusOr<ForeignIndex> ReadFormat(const FormatReader& reader, const ForeignFolder& folder,
                                        const ReadOptions& options) {
  absl::StatusOr<ForeignIndex> read = reader.read(folder, options);
  // Readers of parts (JSON, pickles) say kInvalidArgument of bytes. Where the user has said nothing
  // besides the path, the bytes are what is wrong.
  if (absl::IsInvalidArgument(read.status()) && options == ReadOptions{}) {
    return absl::DataLossError(read.status().message());
  }
  RETURN_IF_ERROR(read.status());
  ForeignIndex index = *std::move(read);
  if (index.format.empty()) index.format = reader.name;
  index.files.assign(folder.files().begin(), folder.files().end());
  for (const std::string& refused : folder.refused()) index.notes.push_back(refused);
  RETURN_IF_ERROR(holdfast::converter::Finish(index));
  return index;
}

}  // namespace holdfast::converter
