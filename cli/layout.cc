// holdfast layout explain: who holds what, of a layout document, of rules for a checkpoint's
// tensors, or of a checkpoint. What is said is worked out in format/layout_explain.h.

#include "format/layout.h"

#include <CLI/CLI.hpp>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "checkpoint/verify.h"
#include "cli/output.h"
#include "cli/progress.h"
#include "cli/verb.h"
#include "format/layout_explain.h"
#include "format/layout_rules.h"
#include "format/writer_assignment.h"

namespace holdfast::cli {
namespace {

using Json = nlohmann::ordered_json;

constexpr uint64_t kDocumentBytesMax = uint64_t{512} << 20;  // as Layout::Parse
// Of each list; then "and N more".
constexpr size_t kTextRowsMax = 24;
constexpr size_t kJsonRowsMax = 10'000;
constexpr size_t kTextRangesMax = 8;  // of one list of ranks
constexpr size_t kJsonRangesMax = 10'000;

struct Options {
  std::string path;
  std::string of;
  std::string tensor;
};

// A layout, and what is known of who has stored what.
struct Subject {
  std::unique_ptr<const Layout> layout;
  std::string text;              // where it comes from
  uint32_t ranks_checked = 0;    // of a document: which could register it
  const Index* index = nullptr;  // null: not of a checkpoint
};

// Everything that was asked about, and what it refers to.
struct Subjects {
  std::optional<CatalogEntry> entry;
  std::optional<Index> index;
  std::vector<Subject> all;
};

absl::Status Prefixed(const absl::Status& status, const std::string& prefix) {
  return absl::Status(status.code(), absl::StrCat(prefix, ": ", std::string(status.message())));
}

absl::StatusOr<Subjects> FromFile(Invocation& invocation, const std::string& path,
                                  const Options& options) {
  ASSIGN_OR_RETURN(std::string text, invocation.file_system.ReadSmallFile(path, kDocumentBytesMax));
  Subjects subjects;
  Subject subject;
  subject.text = options.path;
  if (IsLayoutRules(text)) {
    if (options.of.empty()) {
      return absl::InvalidArgumentError(absl::StrFormat(
          "%s: these are rules, which say nothing without the names of tensors; expected --of CKPT",
          options.path));
    }
    ASSIGN_OR_RETURN(const CatalogEntry entry, Locate(invocation.file_system, options.of));
    ASSIGN_OR_RETURN(const Index index, LoadCommittedIndex(invocation.file_system, entry));
    absl::StatusOr<std::string> document = ExpandLayoutRules(text, index.tensor_states);
    if (!document.ok()) return Prefixed(document.status(), options.path);
    text = *std::move(document);
    absl::StrAppend(&subject.text, " for the tensors of ", entry.directory);
  } else if (!options.of.empty()) {
    return absl::InvalidArgumentError(
        absl::StrFormat("--of: expected a rules file, found another document: %s", options.path));
  }
  absl::StatusOr<std::unique_ptr<const Layout>> layout = Layout::Parse(std::move(text));
  if (!layout.ok()) return Prefixed(layout.status(), options.path);
  subject.layout = *std::move(layout);
  const absl::StatusOr<uint32_t> checked = CheckRanks(*subject.layout);
  if (!checked.ok()) return Prefixed(checked.status(), options.path);
  subject.ranks_checked = *checked;
  subjects.all.push_back(std::move(subject));
  return subjects;
}

absl::StatusOr<Subjects> FromCheckpoint(Invocation& invocation, const Options& options) {
  if (!options.of.empty()) {
    return absl::InvalidArgumentError("--of: expected a rules file, found a checkpoint");
  }
  Subjects subjects;
  ASSIGN_OR_RETURN(subjects.entry, Locate(invocation.file_system, options.path));
  ASSIGN_OR_RETURN(subjects.index, LoadCommittedIndex(invocation.file_system, *subjects.entry));
  for (uint32_t i = 0; i < subjects.index->layouts.size(); ++i) {
    absl::StatusOr<std::unique_ptr<const Layout>> layout =
        Layout::Parse(subjects.index->layouts[i]);
    // It was good when it was saved.
    const std::string name =
        absl::StrFormat("%s: layout %d of INDEX", subjects.entry->directory, i);
    if (!layout.ok()) {
      return absl::DataLossError(absl::StrCat(name, ": ", std::string(layout.status().message())));
    }
    if ((*layout)->world_size() != subjects.index->world_size) {
      return absl::DataLossError(absl::StrFormat("%s: expected a world of %d ranks, found %d", name,
                                                 subjects.index->world_size,
                                                 (*layout)->world_size()));
    }
    Subject subject;
    subject.layout = *std::move(layout);
    subject.text = subjects.entry->directory;
    if (subjects.index->layouts.size() > 1) absl::StrAppend(&subject.text, ", layout ", i);
    subjects.all.push_back(std::move(subject));
  }
  return subjects;
}

// Bytes of tensors per rank: what the images hold, or what the writers are assigned.
std::vector<uint64_t> StoredBytes(const Subject& subject) {
  if (subject.index == nullptr) {
    return WriterAssignment::Create(*subject.layout).AssignedBytes();
  }
  const Index& index = *subject.index;
  std::vector<uint64_t> bytes(subject.layout->world_size(), 0);
  for (const IndexPiece& piece : index.pieces) {
    const TensorState& tensor_state = index.tensor_states[piece.piece.tensor_state];
    bytes.at(Value(index.images[piece.image].rank)) +=
        piece.piece.ElementCount() * ElementBytes(tensor_state.dtype);
  }
  return bytes;
}

std::string MeshText(const Layout& layout) {
  if (layout.mesh().empty()) return "1 rank";
  if (layout.mesh().size() == 1) {
    return absl::StrFormat("%s: %d ranks", layout.mesh()[0].name, layout.world_size());
  }
  return absl::StrFormat("%s: %d ranks; %s varies fastest",
                         absl::StrJoin(layout.mesh(), " x ",
                                       [](std::string* out, const MeshAxis& axis) {
                                         absl::StrAppend(out, axis.name, "=", axis.size);
                                       }),
                         layout.world_size(), layout.mesh().back().name);
}

std::string RangeText(uint64_t min, uint64_t max) {
  if (HumanBytes(min) == HumanBytes(max)) return HumanBytes(min);
  return absl::StrCat(HumanBytes(min), " to ", HumanBytes(max));
}

std::string Plural(uint64_t count, const char* what) {
  return absl::StrCat(count, " ", what, count == 1 ? "" : "s");
}

void PrintRest(size_t shown, size_t all) {
  if (all > shown) std::printf("    and %zu more\n", all - shown);
}

void PrintHeading(const Subject& subject) {
  std::printf("%s\n", Printable(subject.text).c_str());
  std::printf("  mesh     %s\n", Printable(MeshText(*subject.layout)).c_str());
}

void PrintSummary(const Subject& subject, const LayoutSummary& summary) {
  const Layout& layout = *subject.layout;
  std::printf("  tensors  %s in all; all ranks together hold %s\n",
              HumanBytes(summary.distinct_bytes).c_str(), HumanBytes(summary.held_bytes).c_str());
  size_t rows = 0;
  const std::map<std::string, StateTotal> totals = TotalsByState(layout.tensor_states());
  for (const auto& [state, total] : totals) {
    if (rows++ == kTextRowsMax) break;
    std::printf("    %-16s %s, %s\n", Printable(state).c_str(),
                Plural(total.tensor_count, "tensor").c_str(), HumanBytes(total.bytes).c_str());
  }
  PrintRest(kTextRowsMax, totals.size());
  std::printf("  held together by\n");
  rows = 0;
  for (const Sharing& sharing : summary.sharing) {
    if (rows++ == kTextRowsMax) break;
    std::printf("    %s: %s", Plural(sharing.rank_count, "rank").c_str(),
                HumanBytes(sharing.bytes).c_str());
    if (sharing.set_count > 1) {
      std::printf(" in %llu sets of ranks (%s each)",
                  static_cast<unsigned long long>(sharing.set_count),
                  RangeText(sharing.set_bytes_min, sharing.set_bytes_max).c_str());
    }
    std::printf(": %s%s\n", RanksText(sharing.first_ranks, kTextRangesMax).c_str(),
                sharing.set_count > 1 ? "; ..." : "");
  }
  PrintRest(kTextRowsMax, summary.sharing.size());
  std::printf("  ranks\n");
  rows = 0;
  for (const GroupsAlike& alike : summary.alike) {
    if (rows++ == kTextRowsMax) break;
    const uint64_t together = alike.ranks.size() / alike.group_count;
    const char* each = alike.ranks.size() > 1 ? " each" : "";
    std::string how;
    if (alike.group_count > 1) {
      how = together > 1 ? absl::StrFormat(" (%d groups of %d)", alike.group_count, together)
                         : " (each something else)";
    } else if (together > 1) {
      how = " (all the same)";
    }
    std::printf("    %s: hold %s%s%s, store %s%s\n", RanksText(alike.ranks, kTextRangesMax).c_str(),
                HumanBytes(alike.held_bytes).c_str(), each, how.c_str(),
                RangeText(alike.stored_bytes_min, alike.stored_bytes_max).c_str(), each);
  }
  PrintRest(kTextRowsMax, summary.alike.size());
  if (subject.index == nullptr && subject.ranks_checked < layout.world_size()) {
    std::printf("  buffers of %u of the %u ranks were checked: all of them would take too long\n",
                subject.ranks_checked, layout.world_size());
  }
}

Json ToJson(const Subject& subject, const LayoutSummary& summary) {
  const Layout& layout = *subject.layout;
  Json json = {{"layout", subject.text},
               {"mesh", Json::array()},
               {"world_size", layout.world_size()},
               {"states", Json::object()},
               {"distinct_bytes", summary.distinct_bytes},
               {"held_bytes", summary.held_bytes},
               {"sharing_count", summary.sharing.size()},
               {"sharing", Json::array()},
               {"rank_group_count", summary.groups.size()},
               {"rank_groups", Json::array()}};
  if (subject.index == nullptr) json["ranks_checked"] = subject.ranks_checked;
  for (const MeshAxis& axis : layout.mesh()) {
    json["mesh"].push_back({{"axis", axis.name}, {"size", axis.size}});
  }
  for (const auto& [state, total] : TotalsByState(layout.tensor_states())) {
    json["states"][state] = {{"tensors", total.tensor_count}, {"bytes", total.bytes}};
  }
  for (const Sharing& sharing : summary.sharing) {
    if (json["sharing"].size() == kJsonRowsMax) break;
    json["sharing"].push_back({{"rank_count", sharing.rank_count},
                               {"set_count", sharing.set_count},
                               {"bytes", sharing.bytes},
                               {"set_bytes_min", sharing.set_bytes_min},
                               {"set_bytes_max", sharing.set_bytes_max},
                               {"first_ranks", RanksText(sharing.first_ranks, kJsonRangesMax)}});
  }
  for (const RankGroup& group : summary.groups) {
    if (json["rank_groups"].size() == kJsonRowsMax) break;
    json["rank_groups"].push_back({{"ranks", RanksText(group.ranks, kJsonRangesMax)},
                                   {"rank_count", group.ranks.size()},
                                   {"held_bytes", group.held_bytes},
                                   {"stored_bytes_min", group.stored_bytes_min},
                                   {"stored_bytes_max", group.stored_bytes_max}});
  }
  return json;
}

// A part of a tensor state in storage: whose it is, and in which image if there is one.
struct StoredRow {
  Piece piece;
  const BoxTable* boxes = nullptr;
  uint32_t rank = 0;
  std::string file;  // empty: there is no checkpoint
  uint64_t offset_bytes = 0;
};

std::vector<StoredRow> StoredRows(const Subject& subject, const TensorHolders& holders) {
  std::vector<StoredRow> rows;
  if (subject.index == nullptr) {
    for (const StoredPart& part : holders.stored) {
      rows.push_back({part.piece, &holders.boxes, part.rank, "", 0});
    }
    return rows;
  }
  const Index& index = *subject.index;
  const TensorState& tensor_state = subject.layout->tensor_states()[holders.tensor_state];
  const auto number = index.FindTensorState(tensor_state.tensor, tensor_state.state);
  if (!number.has_value()) return rows;
  const auto [first, last] = index.PiecesOf(*number);
  for (size_t i = first; i < last; ++i) {
    const IndexPiece& piece = index.pieces[i];
    const IndexImage& image = index.images[piece.image];
    rows.push_back({piece.piece, &index.boxes, Value(image.rank), image.file, piece.offset_bytes});
  }
  return rows;
}

std::string PlaceText(const HeldPlace& place) {
  std::string text =
      absl::StrFormat("%s: buffer \"%s\" at byte %d", RanksText(place.ranks, kTextRangesMax),
                      place.buffer.substr(0, 200), place.offset_bytes);
  if (!place.strides_bytes.empty()) {
    absl::StrAppend(&text, ", strides ", absl::StrJoin(place.strides_bytes, " "), " bytes");
  }
  return text;
}

void PrintTensor(const Subject& subject, const TensorHolders& holders) {
  const TensorState& tensor_state = subject.layout->tensor_states()[holders.tensor_state];
  std::printf("\n  %s\n",
              Printable(absl::StrFormat("%s %s %s [%s], %s", tensor_state.tensor,
                                        tensor_state.state, DtypeName(tensor_state.dtype),
                                        absl::StrJoin(tensor_state.shape, ", "),
                                        HumanBytes(tensor_state.Bytes())))
                  .c_str());
  size_t shown = 0;
  size_t all = 0;
  for (const HeldPiece& held : holders.held) {
    all += held.places.size();
    if (shown >= kTextRowsMax) continue;
    std::printf("    %s held by", PieceText(held.piece, holders.boxes, tensor_state.shape).c_str());
    for (const HeldPlace& place : held.places) {
      if (shown >= kTextRowsMax) break;
      std::printf("%s%s\n", held.places.size() > 1 ? "\n      " : " ",
                  Printable(PlaceText(place)).c_str());
      ++shown;
    }
  }
  PrintRest(shown, all);
  const std::vector<StoredRow> rows = StoredRows(subject, holders);
  for (size_t i = 0; i < rows.size() && i < kTextRowsMax; ++i) {
    const StoredRow& row = rows[i];
    std::printf("    %s stored by rank %u",
                PieceText(row.piece, *row.boxes, tensor_state.shape).c_str(), row.rank);
    if (!row.file.empty()) {
      std::printf(": %s at byte %llu", row.file.c_str(),
                  static_cast<unsigned long long>(row.offset_bytes));
    }
    std::printf("\n");
  }
  PrintRest(kTextRowsMax, rows.size());
}

Json PieceJson(const Piece& piece, const BoxTable& boxes) {
  Json json = {{"begin", piece.begin}, {"end", piece.end}};
  if (piece.box != kWholeTensor) {
    const BoxView box = boxes[piece.box];
    json["box_lo"] = std::vector<uint64_t>(box.lo.begin(), box.lo.end());
    json["box_size"] = std::vector<uint64_t>(box.size.begin(), box.size.end());
  }
  return json;
}

Json TensorJson(const Subject& subject, const TensorHolders& holders) {
  const TensorState& tensor_state = subject.layout->tensor_states()[holders.tensor_state];
  const std::vector<StoredRow> rows = StoredRows(subject, holders);
  Json json = {{"name", tensor_state.tensor},
               {"state", tensor_state.state},
               {"dtype", DtypeName(tensor_state.dtype)},
               {"shape", tensor_state.shape},
               {"held_count", holders.held.size()},
               {"held", Json::array()},
               {"stored_count", rows.size()},
               {"stored", Json::array()}};
  for (const HeldPiece& held : holders.held) {
    if (json["held"].size() == kJsonRowsMax) break;
    Json piece = PieceJson(held.piece, holders.boxes);
    piece["place_count"] = held.places.size();
    piece["places"] = Json::array();
    for (const HeldPlace& place : held.places) {
      if (piece["places"].size() == kJsonRowsMax) break;
      piece["places"].push_back({{"ranks", RanksText(place.ranks, kJsonRangesMax)},
                                 {"buffer", place.buffer},
                                 {"offset", place.offset_bytes}});
      if (!place.strides_bytes.empty()) piece["places"].back()["strides"] = place.strides_bytes;
    }
    json["held"].push_back(std::move(piece));
  }
  for (const StoredRow& row : rows) {
    if (json["stored"].size() == kJsonRowsMax) break;
    Json piece = PieceJson(row.piece, *row.boxes);
    piece["rank"] = row.rank;
    if (!row.file.empty()) {
      piece["file"] = row.file;
      piece["offset"] = row.offset_bytes;
    }
    json["stored"].push_back(std::move(piece));
  }
  return json;
}

// The tensor states in `selected`, of `count` that fit: printed, or added to `json`.
absl::Status ExplainSelected(const Subject& subject, const std::vector<uint32_t>& selected,
                             size_t count, Json* json) {
  ASSIGN_OR_RETURN(
      const TensorsExplained explained,
      ExplainTensors(*subject.layout, selected,
                     subject.index == nullptr ? Writers::kAssigned : Writers::kNotAsked));
  if (json != nullptr) {
    (*json)["ranks_asked"] = explained.ranks_asked;
    (*json)["tensor_count"] = count;
    (*json)["tensors"] = Json::array();
    for (const TensorHolders& holders : explained.states) {
      (*json)["tensors"].push_back(TensorJson(subject, holders));
    }
    return absl::OkStatus();
  }
  for (const TensorHolders& holders : explained.states) PrintTensor(subject, holders);
  PrintRest(selected.size(), count);
  if (explained.ranks_asked < subject.layout->world_size()) {
    std::printf("  of ranks 0-%u only: to ask all %u would take too long\n",
                explained.ranks_asked - 1, subject.layout->world_size());
  }
  return absl::OkStatus();
}

// Prints what is said of one layout, or returns it in `json`.
absl::Status Explain(const Subject& subject, const std::string& tensor, Json* json) {
  std::vector<uint32_t> selected;
  if (!tensor.empty()) {
    ASSIGN_OR_RETURN(selected, SelectTensors(subject.layout->tensor_states(), tensor));
  }
  if (json == nullptr) PrintHeading(subject);
  if (json != nullptr || tensor.empty()) {
    const LayoutSummary summary = Summarize(*subject.layout, StoredBytes(subject));
    if (json != nullptr) {
      *json = ToJson(subject, summary);
    } else {
      PrintSummary(subject, summary);
    }
  }
  if (tensor.empty()) return absl::OkStatus();
  const size_t count = selected.size();
  selected.resize(std::min(count, json == nullptr ? kTextRowsMax : kJsonRowsMax));
  return ExplainSelected(subject, selected, count, json);
}

absl::Status Run(Invocation& invocation, const Options& options) {
  std::error_code error;
  const std::filesystem::path path = std::filesystem::canonical(options.path, error);
  if (error) {
    return absl::NotFoundError(absl::StrFormat("%s: %s", options.path, error.message()));
  }
  ASSIGN_OR_RETURN(const FileInfo info, invocation.file_system.Stat(path.string()));
  ASSIGN_OR_RETURN(Subjects subjects, info.kind == FileInfo::Kind::kFile
                                          ? FromFile(invocation, path.string(), options)
                                          : FromCheckpoint(invocation, options));
  Json output = {{"schema_version", 1}, {"path", options.path}, {"layouts", Json::array()}};
  for (Subject& subject : subjects.all) {
    if (subjects.index.has_value()) subject.index = &*subjects.index;
    Json json;
    RETURN_IF_ERROR(Explain(subject, options.tensor, invocation.json ? &json : nullptr));
    output["layouts"].push_back(std::move(json));
  }
  if (invocation.json) std::printf("%s\n", JsonText(output).c_str());
  return absl::OkStatus();
}

}  // namespace

void AddLayout(CLI::App& app, Invocation& invocation) {
  CLI::App* layout = app.add_subcommand("layout", "Look at layouts");
  layout->require_subcommand(1);
  layout->fallthrough();
  CLI::App* verb = layout->add_subcommand("explain", "Say who holds what, and who stores it");
  auto options = std::make_shared<Options>();
  verb->add_option("path", options->path,
                   "A layout document, a rules file, a checkpoint's directory, or ROOT/JOB")
      ->required();
  verb->add_option("--tensor", options->tensor,
                   "Where its elements lie: a name, or a pattern as \"layers.*.weight\"");
  verb->add_option("--of", options->of, "The checkpoint whose tensors a rules file is for");
  verb->footer(kExitCodesHelp);
  verb->callback([&invocation, options] {
    invocation.run = [&invocation, options] { return Report(Run(invocation, *options)); };
  });
}

}  // namespace holdfast::cli
