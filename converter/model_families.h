// The built-in mappings: model families, each with the namings in which frameworks hold it.
//
// A family has names of its own, one for every matrix and vector of the model (for Llama and
// Mixtral those of Hugging Face's files), and a table for each naming: what there is made of them.
// So n namings give n * n conversions: to the family's names, and from there on.
#ifndef HOLDFAST_CONVERTER_MODEL_FAMILIES_H_
#define HOLDFAST_CONVERTER_MODEL_FAMILIES_H_

#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "converter/foreign_folder.h"
#include "converter/foreign_index.h"
#include "converter/mapping.h"
#include "converter/model_numbers.h"

namespace holdfast::converter {

std::span<const std::string_view> FamilyNames();  // gpt2, llama, mixtral
// Of a family's name. In the order in which they are looked for in a checkpoint.
std::vector<std::string_view> NamingsOf(std::string_view family);
// Its table: the naming's tensors on the left, the family's on the right. Of known names.
std::string FamilyTable(std::string_view family, std::string_view naming);

// One --map: a family ("llama", "llama:megatron"), or the contents of a file.
struct MapOption {
  std::string text;                          // as the user wrote it
  std::optional<std::string> contents = {};  // of the file of that name
};

// Whether the user means a family, and no file.
bool NamesFamily(std::string_view text);

// kInvalidArgument for a word that is none, with the nearest one, and for a file with a fault, with
// its line. What MapIndex says of an option, before the source is opened.
absl::Status CheckMap(const MapOption& option);

// Maps by one after the other. Of a family the source's naming is found by its tensors' names; of a
// file that side is read of which more names are there. `naming` is what a family is written in if
// its option does not say.
// Errors: kInvalidArgument (a word that is none, with the nearest one; a file with a fault, with
// its line; numbers that nobody asked for), kFailedPrecondition (names of no naming),
// ApplyMapping's.
absl::Status MapIndex(std::span<const MapOption> options, std::string_view naming,
                      const ForeignFolder& folder, ModelNumbers& numbers, Unmapped unmapped,
                      ForeignIndex& index, std::vector<std::string>& left_out);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_MODEL_FAMILIES_H_
