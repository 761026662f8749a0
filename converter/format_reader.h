// What reads a foreign format: it says whether a folder is its own, and brings it into a
// ForeignIndex. The table of all is converter/formats.cc; a new format is one line there.
//
// Readers run in the sandboxed child: they see the folder and nothing else, and whatever they
// return is checked again. They trust no byte, bound all that they allocate, and name in every
// error the file and what was expected and found.
#ifndef HOLDFAST_CONVERTER_FORMAT_READER_H_
#define HOLDFAST_CONVERTER_FORMAT_READER_H_

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "converter/foreign_folder.h"
#include "converter/foreign_index.h"

namespace holdfast::converter {

// What the user says besides the path.
struct ReadOptions {
  std::string tag;  // of a folder that holds several checkpoints; empty: the newest
  // The contents (not the paths: a reader sees the folder only) of what --model DIR, --names
  // FILE and --layout-file FILE supply. Empty: not given.
  std::string model_config;     // config.json
  std::string model_arguments;  // ds_config.json or training arguments as JSON
  std::string names;
  std::string preset;  // converter/parallel_rules.h: how a model family's parameters are cut
  std::string layout;  // converter/layout_file.h: the same for any model

  friend bool operator==(const ReadOptions&, const ReadOptions&) = default;
};

struct FormatReader {
  std::string_view name;  // as in ForeignIndex::format
  // Whether the folder (or the single file) is of this format, from its list of files and their
  // first bytes. A folder of which some files are of the format, but which is no checkpoint of it,
  // is not. Errors are those of reading.
  absl::StatusOr<bool> (*recognizes)(const ForeignFolder& folder);
  // Errors: kDataLoss (damaged: the bytes contradict the format), kPermissionDenied (unsafe: a
  // class that would have to run, a path out of the folder), kUnimplemented (a version or variant
  // that is known and not read, by its name), kInvalidArgument (the options do not fit),
  // kFailedPrecondition (the options lack what the files do not hold), kNotFound (the tag),
  // kResourceExhausted (a limit).
  absl::StatusOr<ForeignIndex> (*read)(const ForeignFolder& folder, const ReadOptions& options);
};

// All readers; the most specific first, because a DeepSpeed folder is full of torch files.
std::span<const FormatReader> FormatReaders();

// The first reader that recognizes the folder; null if none does.
absl::StatusOr<const FormatReader*> RecognizeFormat(const ForeignFolder& folder);

// Reads with this reader, takes the folder's files into the index and makes sure of it (Finish).
// Without options a kInvalidArgument of the reader is kDataLoss: it speaks of the bytes.
absl::StatusOr<ForeignIndex> ReadFormat(const FormatReader& reader, const ForeignFolder& folder,
                                        const ReadOptions& options);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_FORMAT_READER_H_
