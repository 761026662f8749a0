#include "format/image_fingerprints.h"

#include <gtest/gtest.h>

#include <random>
#include <set>
#include <string>

#include "absl/strings/str_cat.h"

namespace holdfast {
namespace {

// Pieces anywhere in an image, some overlapping, some empty; the image is cut anywhere, and every
// range asked once, in any order.
TEST(ImageFingerprintsTest, RangesOfAnyCutAddUpToEveryPiece) {
  constexpr uint32_t kSeed = 5;
  SCOPED_TRACE(absl::StrCat("seed ", kSeed));
  std::mt19937 random(kSeed);
  constexpr size_t kImageBytes = 6000;
  size_t overlaps = 0;
  for (int round = 0; round < 300; ++round) {
    std::vector<std::byte> image(kImageBytes);
    for (std::byte& byte : image) byte = static_cast<std::byte>(random());
    std::vector<TensorState> states;
    std::vector<PlacedPiece> pieces;
    BoxTable boxes;
    std::vector<Fingerprint> expected;
    for (uint32_t i = 0; i < random() % 12; ++i) {
      const Dtype dtype = *DtypeFromNumber(static_cast<uint8_t>(1 + random() % 15));
      states.push_back({absl::StrCat("t", i), "param", dtype, {20, 30}});
      Piece piece{i, kWholeTensor, 0, random() % 5 == 0 ? 0 : random() % 600};
      if (random() % 2 == 0) {
        const uint64_t lo[] = {3, 10};
        const uint64_t size[] = {10, 15};
        piece = {i, boxes.Add(lo, size), 7, 7 + random() % 143};
      }
      const uint64_t bytes = piece.ElementCount() * ElementBytes(dtype);
      const uint64_t offset = random() % (kImageBytes - bytes + 1);
      for (const PlacedPiece& other : pieces) overlaps += other.image_offset_bytes < offset ? 0 : 1;
      pieces.push_back({piece, offset});
      expected.push_back(Fingerprinter().OfPiece(states[i], piece, boxes, 0,
                                                 std::span(image).subspan(offset, bytes)));
    }
    const ImageFingerprints fingerprints(states, boxes, pieces);
    std::set<size_t> cuts = {0, kImageBytes};
    for (uint32_t i = 0; i < random() % 8; ++i) cuts.insert(random() % kImageBytes);
    std::vector<std::pair<size_t, size_t>> ranges;
    for (auto at = cuts.begin(); std::next(at) != cuts.end(); ++at) {
      ranges.emplace_back(*at, *std::next(at));
    }
    std::shuffle(ranges.begin(), ranges.end(), random);
    std::vector<FingerprintPart> parts;
    for (const auto& [begin, end] : ranges) {
      fingerprints.AppendParts(begin, std::span(image).subspan(begin, end - begin), parts);
    }
    std::vector<Fingerprint> found(states.size());
    std::vector<uint64_t> bytes(states.size());
    for (const FingerprintPart& part : parts) {
      found[part.tensor_state] += part.sum;
      bytes[part.tensor_state] += part.bytes;
    }
    for (const PlacedPiece& placed : pieces) {
      const uint32_t state = placed.piece.tensor_state;
      EXPECT_EQ(bytes[state], placed.piece.ElementCount() * ElementBytes(states[state].dtype));
    }
    ASSERT_EQ(found, expected) << "round " << round;
  }
  EXPECT_GT(overlaps, 100u);
}

}  // namespace
}  // namespace holdfast
