#include "engine/sequence.h"

namespace vericache {

void Sequence::restart() {
  tail->clear();
  if (resident) {
    resident->clear();
  }
  if (full) {
    full->vacate();
  }
  forget_drafts();
  verified = 0;
  folded = 0;
  storing = 0;
  queries_from = 0;
  notes.observed = 0;
  if (replays()) {
    // What came back broken may have been weighed. Scores of a replay that is over stay: the KV comes back the same.
    replayed = 0;
    notes.reconstructed = 0;
  }
  ++restarts;
}

}  // namespace vericache
