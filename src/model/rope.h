// Rope: how a model turns positions into rotation angles, and the scalings that stretch them to longer contexts.
// Pure functions: any thread.
#pragma once

#include <vector>

namespace vericache {

enum class RopeType { standard, linear, llama3, yarn };

// Fields that the type does not use keep their defaults.
struct Rope {
  RopeType type = RopeType::standard;
  double theta = 10000.0;
  double factor = 1.0;                 // linear, llama3, yarn: how many times longer the context became
  double low_freq_factor = 1.0;        // llama3
  double high_freq_factor = 4.0;       // llama3
  double original_max_position = 0.0;  // the context before stretching, in tokens
  double beta_fast = 32.0;             // yarn: rotations over the original context above which nothing is stretched
  double beta_slow = 1.0;              // yarn: rotations below which all is stretched
  double attention_factor = 1.0;       // yarn: multiplies cos and sin, hence scores by its square
  bool truncate = true;                // yarn: round the borders of the ramp to whole dimensions
};

// Radians per position of each rotated pair, (head_dim / 2), scaling included. Element i turns dimensions i and
// i + head_dim / 2 (the half-split layout of Hugging Face checkpoints).
// Sources: Su et al. 2021 (arXiv 2104.09864) section 3.2.2; linear: Chen et al. 2023 (arXiv 2306.15595) section 2.2;
// yarn: Peng et al. 2023 (arXiv 2309.00071) section 3.2, definition 2; llama3: Llama 3.1's reference model.
std::vector<double> rope_inverse_frequencies(const Rope& rope, int head_dim);

// Yarn's temperature on the scores as a factor of cos and sin (Peng et al. section 3.3): 0.1 ln(factor) + 1, or the
// ratio of two such terms weighted by mscale and mscale_all_dim where a model gives both (not zero).
double yarn_attention_factor(double factor, double mscale, double mscale_all_dim);

}  // namespace vericache
