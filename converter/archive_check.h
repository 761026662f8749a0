// What torch's archives say of their own bytes. A torch file, and an item of a DCP file, is a zip
// that has the CRC32 of each of its entries. PyTorch writes them and never compares them (it is
// compiled with MINIZ_DISABLE_ZIP_READER_CRC32_CHECKS), so that a changed bit is trained on.
#ifndef HOLDFAST_CONVERTER_ARCHIVE_CHECK_H_
#define HOLDFAST_CONVERTER_ARCHIVE_CHECK_H_

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "converter/foreign_folder.h"
#include "converter/foreign_index.h"
#include "converter/prove.h"

namespace holdfast::converter {

// Reads the whole of every archive that the index takes bytes from, and names each entry that has
// other bytes than it says, with both numbers: at most kProofFindingsMax. Not looked at: entries
// with the CRC32 0, which PyTorch writes where it was told to compute none, and items that are
// compressed. It parses: call it in a sandbox (converter/sandbox.h). Errors: those of reading.
absl::StatusOr<std::vector<std::string>> DamagedEntries(const ForeignFolder& folder,
                                                        const ForeignIndex& index);

// The same in a process of its own, as findings. Blocking. Errors: RunSandboxed's.
absl::Status ProveArchives(const ForeignFolder& folder, const ForeignIndex& index,
                           ProofReport& report);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_ARCHIVE_CHECK_H_
