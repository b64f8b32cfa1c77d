// Horizon policy: how far a sequence drafts before its verification is due. Pure: numbers in, numbers out; no clock.
// One per sequence, used by the thread that plans that sequence.
#pragma once

namespace vericache {

// What a round costs, in any one unit (the engine feeds measured microseconds).
struct RoundCost {
  double draft_token = 1;   // one draft step of this sequence
  double wire = 0;          // bringing its residual; hidden behind drafting as far as drafting lasts
  double verify = 1;        // the verify pass itself
  double verify_token = 0;  // more for each verified row
  double verdict = 0;       // from the last draft that is verified to the verdict: lost where one of them is refused
};

// Tokens per unit of cost of rounds with this horizon when each draft token agrees with probability `agreement`, given
// that those before it did: (1 + p + ... + p^horizon) / (max(horizon * draft_token, wire) + verify + verify_token *
// (horizon + 1) + (1 - p^horizon) * verdict).
double round_rate(int horizon, double agreement, const RoundCost& cost);

// Follows one sequence's acceptance. A fixed horizon ignores it.
class Horizon {
 public:
  static Horizon fixed(int tokens);  // Error if negative; 0 = no drafting
  // Error unless 1 <= least <= most.
  static Horizon adaptive(int least, int most);

  // That a sequence drafts before it is verified, as far as the mean agreement tells: for plans that look ahead.
  int tokens() const { return tokens_; }
  // That it drafts at most. An adaptive horizon ends where drafts are in doubt, and only at last here.
  int reach() const { return most_; }
  // A verification is due where the chance that all drafts stand falls below this: one more draft then gives less for
  // its time than a round does on the whole. 0 of a fixed horizon.
  double least_chance() const { return least_chance_; }
  // The share of draft tokens expected to agree.
  double agreement() const { return agreed_ / (agreed_ + refused_); }

  // After a round: `accepted` of `drafted` tokens stood; the next horizon maximises expected tokens per cost. Two
  // things keep it calm: the agreement is a decaying mean over the last tens of rounds, hundreds of tokens; and a
  // report moves the horizon by at most half of its size (or by 1, if that is more).
  void report(int drafted, int accepted, const RoundCost& cost);

 private:
  Horizon(int least, int most, int tokens, double least_chance)
      : least_(least), most_(most), tokens_(tokens), least_chance_(least_chance) {}

  int least_;
  int most_;
  int tokens_;
  double least_chance_;
  double agreed_ =
      19;  // decayed counts of judged tokens that agreed / disagreed; at first a prior, optimistic and light
  double refused_ = 1;
};

}  // namespace vericache
