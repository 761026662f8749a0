// The numbers of a model that a mapping needs and tensors do not tell: how many heads a fused
// tensor of queries, keys and values has, how many words the vocabulary has without padding. They
// come, in this order, from the user (`--set NAME=NUMBER`), from the training arguments in the
// checkpoint, and from config.json (in the checkpoint's folder, or in `--model DIR`). Nothing is
// guessed.
#ifndef HOLDFAST_CONVERTER_MODEL_NUMBERS_H_
#define HOLDFAST_CONVERTER_MODEL_NUMBERS_H_

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/json_reader.h"
#include "converter/mapping_rules.h"

namespace holdfast::converter {

// Threads: one at a time (it notes which numbers were asked for). Lifetime: owns everything.
class ModelNumbers {
 public:
  struct Request {
    std::span<const std::string> set = {};  // "heads=32"
    std::string arguments = {};             // JSON: the training arguments, or empty
    std::string config = {};                // config.json, or empty
    uint64_t tensor_ranks = 1;              // of what is written: vocabularies are padded for them
  };
  // kInvalidArgument, naming option or file.
  static absl::StatusOr<ModelNumbers> Create(const Request& request);

  // Errors: kInvalidArgument that names the option which supplies it; kFailedPrecondition (the
  // arguments and config.json contradict each other).
  absl::StatusOr<uint64_t> Get(const MappingNumber& number);
  // The same, if it is known.
  absl::StatusOr<std::optional<uint64_t>> Find(const MappingNumber& number);
  // Rows of a vocabulary of `rows` words with padding: what is set, or what Megatron makes of it.
  absl::StatusOr<uint64_t> PaddedRows(const MappingNumber& padded, uint64_t rows);

  // kFailedPrecondition if the source has the fact, with another value.
  absl::Status Require(const MappingRequirement& requirement, std::string_view where) const;
  // kInvalidArgument if a number was set that nobody has asked for.
  absl::Status CheckAllUsed() const;

 private:
  ModelNumbers() = default;
  std::optional<uint64_t> FromArguments(std::string_view name) const;
  std::optional<uint64_t> FromConfig(std::string_view name) const;

  std::map<std::string, uint64_t, std::less<>> set_;
  std::set<std::string, std::less<>> asked_;
  std::unique_ptr<JsonDocument> arguments_;
  std::unique_ptr<JsonDocument> config_;
  uint64_t tensor_ranks_ = 1;
};

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_MODEL_NUMBERS_H_
