// What a reader of names accepts is exactly what the makers make.
#include <string>

#include "base/check.h"
#include "base/utf8.h"
#include "format/checkpoint_names.h"
#include "format/image.h"
#include "tests/fuzz/targets.h"

namespace holdfast::fuzz {

bool FuzzNames(Input input) {
  const std::string name(input.begin(), input.end());
  bool is_accepted = false;
  if (const auto id = ParseCheckpointDirectoryName(name); id.has_value()) {
    is_accepted = true;
    CHECK(CheckpointDirectoryName(*id) == name);
  }
  if (const auto image = ParseImageFileName(name); image.has_value()) {
    is_accepted = true;
    CHECK(ImageFileName(image->rank, image->retry) == name);
    CHECK_OK(CheckFileName(name));
  }
  if (const auto number = ParseNumberedName("BAD", name); number.has_value()) {
    is_accepted = true;
    CHECK(BadFileName(*number) == name);
  }
  if (const auto number = ParseNumberedName("HEAD", name); number.has_value()) {
    is_accepted = true;
    CHECK(HeadFileName(*number) == name);
  }
  for (const absl::Status& status : {CheckJobName(name), CheckFileName(name), CheckJobUuid(name)}) {
    CHECK(status.ok() || status.code() == absl::StatusCode::kInvalidArgument);
    CHECK(IsUtf8(std::string(status.message())));
    if (!status.ok()) continue;
    is_accepted = true;
    // Fit to be a name in a directory, and no other place.
    CHECK(!name.empty() && name[0] != '.' && name.find('/') == std::string::npos &&
          name.find('\0') == std::string::npos && name.size() <= 255);
  }
  const std::string escaped = EscapeName(name);
  CHECK(escaped.find('/') == std::string::npos && escaped.find('.') == std::string::npos);
  return is_accepted;
}

}  // namespace holdfast::fuzz
