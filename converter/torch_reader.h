// The format "torch": one file of torch.save, whatever its author put in. Files differ in habits,
// not in a standard, so names and states follow rules:
//
// - A state dict (what Module.state_dict() made: it has `_metadata`; or every value is a tensor and
//   it stands under a name that people give one: model, state_dict, model_state_dict, ...) holds
//   weights: state "param", named by its keys. `module.` (DDP) and `_orig_mod.` (torch.compile)
//   before all of them are dropped. Under a name with "ema" the state is "ema". Two of them
//   in one file keep the path before their names.
// - An optimizer's dict ({'state', 'param_groups'}) gives its states, named by param_names where
//   the groups have them, else by the id: an id is a position, and nothing in the file says of
//   what.
// - A pickled module gives `_parameters` ("param") and `_buffers` ("buffer") by their paths.
// - Everything else is named by its path, joined with dots: state "param" for torch.nn.Parameter,
//   "rng" below a key of that name, "tensor" where the file is nothing but tensors, else "other".
// - Of two values with one name the second has brackets where the path has: names[7].
#ifndef HOLDFAST_CONVERTER_TORCH_READER_H_
#define HOLDFAST_CONVERTER_TORCH_READER_H_

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "converter/foreign_folder.h"
#include "converter/foreign_index.h"
#include "converter/format_reader.h"
#include "converter/torch_file.h"

namespace holdfast::converter {

// See FormatReader. A single file that is one of torch.save, TorchScript or torch.export (these are
// refused by name when read).
absl::StatusOr<bool> RecognizesTorch(const ForeignFolder& folder);
absl::StatusOr<ForeignIndex> ReadTorch(const ForeignFolder& folder, const ReadOptions& options);

// The same of a file that is open; it is file number 0 of the index, which has not passed Finish.
absl::StatusOr<ForeignIndex> IndexOfTorchFile(const TorchFile& file);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_TORCH_READER_H_
