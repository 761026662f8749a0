#include "format/tensor_view.h"

#include <algorithm>
#include <filesystem>
#include <map>
#include <set>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "format/hdf5_view.h"
#include "format/planner_geometry.h"

namespace holdfast {
namespace {

// All boxes, one behind the other: equal pieces have equal ones.
std::vector<uint64_t> KeyOf(const std::vector<Hdf5Box>& boxes) {
  std::vector<uint64_t> key;
  for (const Hdf5Box& box : boxes) {
    key.insert(key.end(), box.lo.begin(), box.lo.end());
    key.insert(key.end(), box.size.begin(), box.size.end());
  }
  return key;
}

class ViewPlan {
 public:
  ViewPlan(const Index& index, std::string checkpoint, const ViewPaths& paths)
      : index_(index), checkpoint_(std::move(checkpoint)), paths_(paths) {
    for (const TensorState& tensor_state : index.tensor_states) groups_.Add(tensor_state);
  }

  Hdf5ViewPlan ForHdf5(uint64_t bytes_max);
  uint64_t in_parts_count() const { return in_parts_count_; }
  uint64_t files_of_one_max() const { return files_of_one_max_; }

 private:
  Hdf5ViewDataset Dataset(uint32_t number);
  Hdf5ViewSource Source(const IndexPiece& piece, uint32_t number_in_image) const;

  const Index& index_;
  const std::string checkpoint_;
  const ViewPaths& paths_;
  ViewGroups groups_;
  uint64_t in_parts_count_ = 0;
  uint64_t files_of_one_max_ = 0;
};

Hdf5ViewPlan ViewPlan::ForHdf5(uint64_t bytes_max) {
  Hdf5ViewPlan plan;
  plan.groups = groups_.Make({{"holdfast_view", uint64_t{1}},
                              {"job", std::string_view(index_.job)},
                              {"job_uuid", std::string_view(index_.job_uuid)},
                              {"attempt", uint64_t{Value(index_.checkpoint.attempt)}},
                              {"step", uint64_t{Value(index_.checkpoint.step)}},
                              {"world_size", uint64_t{index_.world_size}},
                              {"directory", std::string_view(checkpoint_)},
                              {"writer", WriterVersion()}});
  plan.parts_group = ViewGroups::kParts;
  plan.dataset_count = index_.tensor_states.size();
  plan.dataset = [this](size_t number) { return Dataset(static_cast<uint32_t>(number)); };
  plan.bytes_max = bytes_max;
  return plan;
}

Hdf5ViewSource ViewPlan::Source(const IndexPiece& piece, uint32_t number_in_image) const {
  const TensorState& tensor_state = index_.tensor_states[piece.piece.tensor_state];
  Hdf5ViewSource source;
  source.file = index_.images[piece.image].file;
  source.dataset = absl::StrCat("/tensors/", EscapeName(tensor_state.state), "/",
                                PieceDatasetName(tensor_state.tensor, number_in_image));
  source.shape = PieceDatasetShape(piece.piece, tensor_state.shape, index_.boxes);
  source.offset_bytes = piece.offset_bytes;
  source.boxes = ViewBoxesOf(piece.piece, tensor_state, index_.boxes);
  return source;
}

Hdf5ViewDataset ViewPlan::Dataset(uint32_t number) {
  const TensorState& tensor_state = index_.tensor_states[number];
  Hdf5ViewDataset dataset;
  dataset.group = groups_.Of(tensor_state);
  dataset.name = PieceDatasetName(tensor_state.tensor, 0);
  dataset.dtype = tensor_state.dtype;
  dataset.shape = tensor_state.shape;
  std::set<std::vector<uint64_t>> seen;
  std::set<uint32_t> images;
  uint32_t number_in_image = 0;
  bool numbers_known = true;
  const auto [first, last] = index_.PiecesOf(number);
  for (size_t i = first; i < last; ++i) {
    const IndexPiece& piece = index_.pieces[i];
    number_in_image =
        i > first && index_.pieces[i - 1].image == piece.image ? number_in_image + 1 : 0;
    if (piece.piece.begin == piece.piece.end) {
      // Offsets do not say where an empty piece stands among the others of its image.
      numbers_known = false;
      continue;
    }
    Hdf5ViewSource source = Source(piece, number_in_image);
    if (!seen.insert(KeyOf(source.boxes)).second) continue;  // a replica
    images.insert(piece.image);
    dataset.sources.push_back(std::move(source));
  }
  const bool in_parts =
      !dataset.sources.empty() && (images.size() > kViewFilesMax || !numbers_known);
  dataset.storage = in_parts ? Hdf5Storage::kParts : Hdf5Storage::kDatasets;
  for (Hdf5ViewSource& source : dataset.sources) {
    source.file = absl::StrCat(in_parts ? paths_.parts : paths_.datasets, source.file);
  }
  dataset.attributes = {{"name", std::string_view(tensor_state.tensor)},
                        {"state", std::string_view(tensor_state.state)},
                        {"dtype", DtypeName(tensor_state.dtype)},
                        {"shape", tensor_state.shape},
                        {"source_files", uint64_t{images.size()}}};
  in_parts_count_ += in_parts ? 1 : 0;
  files_of_one_max_ = std::max<uint64_t>(files_of_one_max_, images.size());
  return dataset;
}

std::string WithSlash(const std::filesystem::path& path) {
  std::string text = path.string();
  if (text.empty() || text.back() != '/') text += '/';
  return text;
}

}  // namespace

void ViewGroups::Add(const TensorState& tensor_state) {
  // A heap entry is the name and its NUL, rounded up to 8.
  states_[tensor_state.state].names_bytes +=
      (PieceDatasetName(tensor_state.tensor, 0).size() + 8) / 8 * 8;
}

std::vector<Hdf5Group> ViewGroups::Make(std::vector<Hdf5Attribute> root) {
  std::vector<Hdf5Group> groups;
  groups.push_back({"/", std::move(root), 64});
  groups.push_back({"/tensors", {}, 16 * states_.size()});
  groups.push_back({"/holdfast", {}, 32});
  groups.push_back({"/holdfast/parts", {}, 64});
  for (auto& [name, state] : states_) {
    state.group = static_cast<uint32_t>(groups.size());
    groups.push_back(
        {absl::StrCat("/tensors/", EscapeName(name)), {{"name", name}}, state.names_bytes});
  }
  return groups;
}

uint32_t ViewGroups::Of(const TensorState& tensor_state) const {
  return states_.at(tensor_state.state).group;
}

std::vector<Hdf5Box> ViewBoxesOf(const Piece& piece, const TensorState& tensor_state,
                                 const BoxTable& boxes) {
  const std::vector<uint64_t> origin(tensor_state.shape.size(), 0);
  const BoxView box =
      piece.box == kWholeTensor ? BoxView{origin, tensor_state.shape} : boxes[piece.box];
  std::vector<ElementBox> cuts;
  CutIntoBoxes(box, piece.begin, piece.end, cuts);
  std::vector<Hdf5Box> found;
  for (const ElementBox& cut : cuts) {
    const BoxView view = cut.View();
    found.push_back({{view.lo.begin(), view.lo.end()}, {view.size.begin(), view.size.end()}});
  }
  return found;
}

ViewPaths AbsoluteViewPaths(const std::string& checkpoint) {
  CHECK(checkpoint.starts_with('/'));
  // HDF5 would look for a file that is gone from an absolute path beside the view and in the
  // working directory, under its last component, which all checkpoints have.
  std::string up;
  for (size_t i = 0; i < kViewDepthMax; ++i) up += "../";  // ".." of the root is the root
  return {WithSlash(up + checkpoint.substr(1)), WithSlash(checkpoint)};
}

ViewPaths RelativeViewPaths(const std::string& checkpoint, const std::string& view_directory) {
  const std::filesystem::path directory(checkpoint);
  CHECK(directory.is_absolute() && view_directory.starts_with('/'));
  // With the name of the checkpoint in it also where the view lies inside, for the same reason.
  const std::string name =
      WithSlash((directory.parent_path().lexically_relative(view_directory) / directory.filename())
                    .lexically_normal());
  return {name, name};
}

absl::StatusOr<TensorView> BuildTensorView(const Index& index, const std::string& checkpoint,
                                           const ViewPaths& paths, uint64_t bytes_max) {
  ViewPlan plan(index, checkpoint, paths);
  TensorView view;
  ASSIGN_OR_RETURN(view.bytes, BuildHdf5View(plan.ForHdf5(bytes_max)));
  view.tensor_count = index.tensor_states.size();
  view.in_parts_count = plan.in_parts_count();
  view.files_of_one_max = plan.files_of_one_max();
  return view;
}

}  // namespace holdfast
