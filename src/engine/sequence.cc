#include "engine/sequence.h"

namespace vericache {

void Sequence::restart() {
  tail->clear();
  if (resident) {
    resident->clear();
  }
  if (full) {
    full->set_stored(0);
  }
  forget_drafts();
  verified = 0;
  folded = 0;
  storing = 0;
  queries_from = 0;
  notes.observed = 0;
  ++restarts;
}

}  // namespace vericache
