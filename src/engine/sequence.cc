#include "engine/sequence.h"

#include <algorithm>

namespace vericache {

void Sequence::restart() {
  tail->clear();
  if (resident) {
    resident->clear();
  }
  if (full) {
    full->set_stored(0);
  }
  drafted = 0;
  verified = 0;
  folded = 0;
  storing = 0;
  queries_from = 0;
  ++restarts;
}

void Sequence::release_tail() {
  const int outside = full ? full->stored() * kPageTokens : folded;
  tail->release_before(std::min(folded, outside));
}

}  // namespace vericache
