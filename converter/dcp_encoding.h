// Writes the `.metadata` that torch.distributed.checkpoint.load reads: the inverse of
// ParseDcpMetadata.
#ifndef HOLDFAST_CONVERTER_DCP_ENCODING_H_
#define HOLDFAST_CONVERTER_DCP_ENCODING_H_

#include <string>

#include "converter/dcp_metadata.h"

namespace holdfast::converter {

// The classes of PyTorch 2.3 and later, in a pickle of protocol 2; equal metadata gives equal
// bytes. `module` is not looked at. Chunks and objects without an item are named, but not stored:
// readers find holes there. Every path becomes a tuple of strings in planner_data; keys without a
// path have none, and where no key has one planner_data is None. CHECKs that chunks, items and
// transforms are in range.
std::string EncodeDcpMetadata(const DcpMetadata& metadata);

}  // namespace holdfast::converter

#endif  // HOLDFAST_CONVERTER_DCP_ENCODING_H_
