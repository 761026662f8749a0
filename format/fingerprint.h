// Fingerprints: 128 bits that say whether two tensor states are equal, whatever their layouts. The
// fingerprint of a tensor state is a term of its dtype and shape plus one term per element, so the
// parts of a tensor, wherever they lie and however they are cut, are summed on their own and added
// up. Definition, bound and test vectors: docs/FORMAT.md, section 4.
//
// In short: the elements in row-major order are one string of bytes, cut into 32-bit little-endian
// words, 1024 words to a block. Word j of block b counts  w * sum over k < 4 of t[k][j] * u[b][k]
// modulo p = 2^127 - 1, with pseudo-random t < 2^32 and u < p. Two tensor states that differ have
// one fingerprint with probability at most 2^-126, over the choice of t and u. These are public: it
// is no defence against somebody who chooses the contents with them in hand.
//
// Two levels make it fast: the sums of w * t[k][j] over a block are plain integers, and the prime
// is met once per block.
#ifndef HOLDFAST_FORMAT_FINGERPRINT_H_
#define HOLDFAST_FORMAT_FINGERPRINT_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "absl/numeric/int128.h"
#include "format/fingerprint_kernel.h"
#include "format/tensor_piece.h"

namespace holdfast {

// A fingerprint, or a part of one: an integer modulo 2^127 - 1. Zero: the sum of nothing.
class Fingerprint {
 public:
  constexpr Fingerprint() = default;
  // CHECKs value < 2^127 - 1.
  explicit Fingerprint(absl::uint128 value);
  // Little-endian, as INDEX has it. Empty if not below 2^127 - 1.
  static std::optional<Fingerprint> FromBytes(std::span<const std::byte, 16> bytes);
  std::array<std::byte, 16> Bytes() const;
  // 32 small hexadecimal digits, the most significant first.
  std::string Hex() const;

  Fingerprint& operator+=(const Fingerprint& other);
  friend Fingerprint operator+(Fingerprint a, const Fingerprint& b) { return a += b; }
  friend bool operator==(const Fingerprint&, const Fingerprint&) = default;

 private:
  absl::uint128 value_ = 0;
};

// The term of dtype and shape. The fingerprint of a tensor state is this plus the sum over all of
// its elements, each once. Names are not in it.
Fingerprint FingerprintOfShape(const TensorState& tensor_state);

// Sums over elements. Keeps the coefficients that it used last: neighbours in one tensor are
// cheaper with one Fingerprinter. Elements that lie scattered in their tensor cost more: what each
// run of consecutive ones takes at least is about the time of 2 KiB.
//
// Threads: one thread at a time. 600 bytes.
class Fingerprinter {
 public:
  enum class Kernel { kPortable, kAvx2 };  // equal results
  static bool Supports(Kernel kernel);     // by this CPU

  Fingerprinter();                        // the fastest kernel
  explicit Fingerprinter(Kernel kernel);  // CHECKs Supports(kernel)

  // Over bytes first_byte, first_byte + 1, ... of the elements of the tensor in row-major order.
  // They may lie at any address, and begin and end within an element: what is cut there adds up to
  // the element. CHECKs that the tensor has them.
  Fingerprint OfRun(const TensorState& tensor_state, uint64_t first_byte,
                    std::span<const std::byte> bytes);

  // The same of a piece of the tensor state whose elements lie one behind the other: `bytes` are
  // its bytes from skip_bytes on. CheckPiece holds for the piece; CHECKs that it has them.
  Fingerprint OfPiece(const TensorState& tensor_state, const Piece& piece, const BoxTable& boxes,
                      uint64_t skip_bytes, std::span<const std::byte> bytes);

 private:
  void AddBytes(uint64_t position, std::span<const std::byte> bytes);
  void AddBytesOfBlock(size_t position, std::span<const std::byte> bytes);
  void FinishBlock();
  Fingerprint TakeSum();

  static constexpr uint64_t kNone = UINT64_MAX;

  const fingerprint_kernel::AddWordsFunction add_words_;
  const fingerprint_kernel::MakeOuterFunction make_outer_;
  uint64_t outer_group_ = kNone;
  fingerprint_kernel::OuterGroup outer_;
  uint64_t block_ = kNone;  // whose words are in `sums_`
  fingerprint_kernel::InnerSums sums_;
  absl::uint128 total_ = 0;
};

}  // namespace holdfast

#endif  // HOLDFAST_FORMAT_FINGERPRINT_H_
