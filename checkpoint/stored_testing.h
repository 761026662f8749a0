// For tests: checkpoints made from whole tensors in any layout, as files of a real disk, without an
// engine. The whole tensors are the truth that readers are compared with.
#ifndef HOLDFAST_CHECKPOINT_STORED_TESTING_H_
#define HOLDFAST_CHECKPOINT_STORED_TESTING_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "format/index.h"
#include "format/layout.h"
#include "tests/support/temporary_directory.h"

namespace holdfast {

// Whole tensor states by (tensor, state).
struct Truth {
  TensorState state;
  std::vector<std::byte> bytes;
};
using Truths = std::map<std::pair<std::string, std::string>, Truth>;

Truths RandomTruths(const std::vector<TensorState>& states, std::mt19937_64& random);

inline constexpr uint64_t kStoredBlockBytes = 4096;

// A checkpoint in a directory of its own; it has no manifest.
class StoredCheckpoint {
 public:
  // Where pieces lie in images: at a multiple of their elements' size, as images have it, or
  // anywhere, so that elements lie in two blocks.
  enum class Alignment { kOfElements, kNone };

  // The tensors in this layout, with random gaps, in memory; with their fingerprints.
  StoredCheckpoint(const Layout& layout, const Truths& truths, std::mt19937_64& random,
                   Alignment alignment = Alignment::kOfElements);

  // At the end of image 0.
  void AddBlob(BlobScope scope, uint32_t rank, const std::string& name, const std::string& text);

  // Writes all files, which must not be there, with the checksums of what is in the images now.
  void Write();

  const std::string& directory() const { return directory_.path(); }
  std::string PathOf(uint32_t image) const;
  Index& index() { return index_; }
  const Index& index() const { return index_; }
  std::vector<std::byte>& image(uint32_t number) { return images_[number]; }

 private:
  void Add(Piece piece, const BoxTable& boxes, uint32_t rank, const Truths& truths,
           std::mt19937_64& random, Alignment alignment, std::vector<std::byte>& image);

  TemporaryDirectory directory_;
  Index index_;
  std::vector<std::vector<std::byte>> images_;
};

// A tensor "w" (param, bfloat16) of two dimensions over ranks on the axis "tp". `place`: of the
// state, from its comma on; see CutOver.
std::unique_ptr<const Layout> MatrixLayout(uint32_t ranks, uint64_t rows, uint64_t columns,
                                           const std::string& place);
// Cut over this dimension.
std::string CutOver(int dim);

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_STORED_TESTING_H_
