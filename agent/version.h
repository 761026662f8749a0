#ifndef HOLDFAST_AGENT_VERSION_H_
#define HOLDFAST_AGENT_VERSION_H_

namespace holdfast {

// As in hook/holdfast.h: both are released together.
inline constexpr char kVersion[] = "0.1.0";

}  // namespace holdfast

#endif  // HOLDFAST_AGENT_VERSION_H_
