// Texts with names, as one run of bytes: "name=value" and a separator, again and again. What a rank
// is started with and how it ended are passed on and kept in this form: any bytes but the separator
// may stand in a value (arguments and environments hold what they like, UTF-8 or not), and both
// sides need nothing but the standard library, because holdfast-shim is one of them.
#ifndef HOLDFAST_AGENT_RUN_FIELDS_H_
#define HOLDFAST_AGENT_RUN_FIELDS_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace holdfast {

// Threads: as a value.
class Fields {
 public:
  // Arguments and environments of one process: the kernel allows 6 MiB (execve(2)).
  static constexpr size_t kBytesMax = size_t{8} << 20;

  // `name` is without '='; neither holds the separator. A name may be given again and again.
  void Add(std::string_view name, std::string_view value);
  void Add(std::string_view name, int64_t value);

  // The first of that name; nothing if there is none.
  std::optional<std::string> Text(std::string_view name) const;
  // Nothing also if it is no decimal number in [min, max].
  std::optional<int64_t> Number(std::string_view name, int64_t min, int64_t max) const;
  std::vector<std::string> All(std::string_view name) const;

  std::string Encode(char separator) const;
  // Nothing if it has more than kBytesMax bytes, does not end with a separator, or a field has no
  // '=': it was cut off, or is something else.
  static std::optional<Fields> Decode(std::string_view bytes, char separator);

 private:
  std::vector<std::pair<std::string, std::string>> fields_;
};

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_RUN_FIELDS_H_
