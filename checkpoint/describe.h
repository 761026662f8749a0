// How the engine's texts call things.
#ifndef HOLDFAST_CHECKPOINT_DESCRIBE_H_
#define HOLDFAST_CHECKPOINT_DESCRIBE_H_

#include <string>

#include "base/ids.h"

namespace holdfast {

// "step 1000 of attempt 4"
std::string Describe(CheckpointId id);

}  // namespace holdfast

#endif  // HOLDFAST_CHECKPOINT_DESCRIBE_H_
