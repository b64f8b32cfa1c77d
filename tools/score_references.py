#!/usr/bin/env python3
"""Writes what the token-dropping compressors must score and keep, computed from the papers' formulas in float64.

    python3 tools/score_references.py [file, default: tests/data/compress/scores.json]

Needs NumPy. Nothing here knows the C++ code: tensors come from a counter (splitmix64) that the test repeats, scores from whole
matrices. tests/compress/score_references_test.cc compares.
"""

import json
import pathlib
import sys

import numpy as np

TOKENS, HEADS, KV_HEADS, DIM = 256, 4, 2, 32
REPEATED, REPEATED_CHUNKS = 192, [(0, 96), (96, 97), (97, 192)]
GROUP = HEADS // KV_HEADS
THETA = 10000.0
SCALE = DIM**-0.5


def uniform(stream, *shape):
    """Multiples of 1/64 in [-2, 2), which bf16 holds exactly: value i of a stream is a function of (stream, i)."""
    x = np.arange(np.prod(shape), dtype=np.uint64) + np.uint64(stream << 32)
    with np.errstate(over="ignore"):
        x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return ((x >> np.uint64(56)).astype(np.int64) - 128).reshape(shape) / 64.0


def rotation(position):
    """RoPE (Su et al. 2021) as a matrix, rotate-half convention."""
    half = DIM // 2
    angles = position * THETA ** (-2.0 * np.arange(half) / DIM)
    matrix = np.zeros((DIM, DIM))
    for i, angle in enumerate(angles):
        matrix[i, i] = matrix[i + half, i + half] = np.cos(angle)
        matrix[i, i + half], matrix[i + half, i] = -np.sin(angle), np.sin(angle)
    return matrix


class Layer:
    """One layer after RoPE: queries (position, head, dim), keys and values (kv head, token, dim)."""

    def __init__(self):
        # Keys of different lengths and queries that lean one way, so that the methods disagree.
        self.keys = uniform(1, KV_HEADS, TOKENS, DIM)
        self.keys[:, ::7] /= 4
        self.keys[1] /= 2
        self.values = uniform(2, KV_HEADS, TOKENS, DIM)
        self.values[:, 5::11] /= 2
        self.queries = uniform(3, TOKENS, HEADS, DIM)

    def attention(self, rows):
        """(kv head, rows, token): softmax with the causal mask, summed over the query heads of a KV head."""
        out = np.zeros((KV_HEADS, len(rows), TOKENS))
        for head in range(HEADS):
            logits = self.queries[rows, head] @ self.keys[head // GROUP].T * SCALE
            logits[np.arange(TOKENS)[None, :] > np.asarray(rows)[:, None]] = -np.inf
            weights = np.exp(logits - logits.max(axis=1, keepdims=True))
            out[head // GROUP] += weights / weights.sum(axis=1, keepdims=True)
        return out


def knorm(layer):  # Devoto et al. 2024, section 3
    return -np.linalg.norm(layer.keys, axis=-1)


def keydiff(layer):  # Park et al. 2025, section 3
    directions = layer.keys / np.linalg.norm(layer.keys, axis=-1, keepdims=True)
    anchor = directions.mean(axis=1)
    return -np.einsum("htd,hd->ht", directions, anchor) / np.linalg.norm(anchor, axis=-1, keepdims=True)


def tova(layer):  # Oren et al. 2024, section 3.2
    mass = layer.attention([TOKENS - 1])[:, 0]
    return np.broadcast_to(mass.mean(axis=0), (KV_HEADS, TOKENS))


def h2o(layer, recent):  # Zhang et al. 2023, section 4
    scores = layer.attention(list(range(TOKENS))).sum(axis=1)
    scores[:, TOKENS - recent :] = np.inf
    return scores


def snapkv(layer, window, kernel):  # Li et al. 2024, section 4
    mass = layer.attention(list(range(TOKENS - window, TOKENS))).sum(axis=1)
    padded = np.pad(mass, ((0, 0), (kernel // 2, kernel // 2)))
    scores = np.lib.stride_tricks.sliding_window_view(padded, kernel, axis=1).mean(axis=-1).copy()
    scores[:, TOKENS - window :] = np.inf
    return scores


def kvzip(layer):  # Kim et al. 2025, section 3.2
    """Three chunks of rows behind the context, each seeing it whole and its own rows up to itself."""
    scores = np.zeros((KV_HEADS, TOKENS))
    repeated_keys, repeated_queries = uniform(4, KV_HEADS, REPEATED, DIM), uniform(5, REPEATED, HEADS, DIM)
    for first, end in REPEATED_CHUNKS:
        rows = end - first
        for head in range(HEADS):
            kv_head = head // GROUP
            keys = np.concatenate([layer.keys[kv_head], repeated_keys[kv_head, first:end]])
            logits = repeated_queries[first:end, head] @ keys.T * SCALE
            logits[:, TOKENS:][np.arange(rows)[None, :] > np.arange(rows)[:, None]] = -np.inf
            weights = np.exp(logits - logits.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            scores[kv_head] = np.maximum(scores[kv_head], weights[:, :TOKENS].max(axis=0))
    return scores


def expected(layer, window, future, sinks):  # Devoto et al. 2025, section 3
    ahead = np.mean([rotation(TOKENS + i) for i in range(future)], axis=0)
    scores = np.zeros((KV_HEADS, TOKENS))
    for head in range(HEADS):
        plain = np.stack([rotation(p).T @ layer.queries[p, head] for p in range(TOKENS - window, TOKENS)])
        mean, covariance = ahead @ plain.mean(axis=0), ahead @ np.cov(plain.T, bias=True) @ ahead.T
        keys = layer.keys[head // GROUP, sinks:]
        logits = keys @ mean * SCALE + np.einsum("td,de,te->t", keys, covariance, keys) * SCALE**2 / 2
        weights = np.exp(logits - logits.max())
        scores[head // GROUP, sinks:] += weights / weights.sum() / GROUP
    scores *= np.linalg.norm(layer.values, axis=-1)
    scores[:, :sinks] = np.inf
    return scores


def best(scores, count):
    """The best of a row, ascending; of equals the later."""
    order = sorted(range(TOKENS), key=lambda t: (-scores[t], -t))
    return sorted(order[:count])


def budget_tokens(share, tokens, least):
    return min(tokens, max(int(np.ceil(share * tokens)), least))


def pyramid(share, window, beta, layers, tokens):
    """Tokens per head and layer (Cai et al. 2024, section 4)."""
    total = budget_tokens(share, tokens, max(64, window))
    mean = total - window
    top = mean / beta
    bottom = 2 * mean - top
    if bottom > tokens - window:
        bottom = tokens - window
        top = 2 * mean - bottom
    return [window + int(np.floor(bottom - (bottom - top) * i / (layers - 1) + 0.5)) for i in range(layers)]


def ada_marks(scores, count):
    """Heads of the best `count` of all scores of a layer (Feng et al. 2024, algorithm 1)."""
    order = sorted(((-scores[h, t], -h, -t) for h in range(KV_HEADS) for t in range(TOKENS)))
    return [sum(1 for one in order[:count] if -one[1] == h) for h in range(KV_HEADS)]


def ada_counts(marks, alpha, mean):
    """Whole tokens: shares rounded down, what is left to the heads that lost most by it."""
    shares = [(1 - alpha) * mean + alpha * mean * len(marks) * m / sum(marks) for m in marks]
    counts = [int(share) for share in shares]
    by_loss = sorted(range(len(marks)), key=lambda h: (counts[h] - shares[h], h))
    for h in by_loss[: mean * len(marks) - sum(counts)]:
        counts[h] += 1
    return counts


def rounded(scores):
    return [["inf" if np.isinf(x) else float(f"{x:.7g}") for x in row] for row in scores]


def main():
    layer = Layer()
    kept = budget_tokens(0.3, TOKENS, 64)
    methods = {
        "knorm:budget=0.3": knorm(layer),
        "keydiff:budget=0.3": keydiff(layer),
        "tova:budget=0.3": tova(layer),
        "h2o:budget=0.3": h2o(layer, kept // 2),
        "snapkv:budget=0.3,window=16,kernel=5": snapkv(layer, 16, 5),
        "kvzip:budget=0.3": kvzip(layer),
        "expected:budget=0.3,window=48,future=100,sinks=4": expected(layer, 48, 100, 4),
    }
    cases = [
        {"spec": spec, "scores": rounded(scores), "kept": [best(row, kept) for row in scores]}
        for spec, scores in methods.items()
    ]
    ada = []
    for alpha in (0.2, 0.8):
        for spec, scores in methods.items():
            marks = ada_marks(scores, kept * KV_HEADS)
            counts = ada_counts(marks, alpha, kept)
            assert max(counts) <= min(TOKENS, 4 * kept)
            ada.append({
                "spec": f"adakv:alpha={alpha}({spec})",
                "scores_of": spec,
                "kept": [best(row, count) for row, count in zip(scores, counts)],
            })
    pyramids = [
        {"spec": f"pyramidkv:budget={share},window={window},beta={beta}", "layers": layers, "tokens": tokens,
         "kept": pyramid(share, window, beta, layers, tokens)}
        for share, window, beta, layers, tokens in [
            (0.2, 8, 20, 32, 8192), (0.2, 8, 20, 5, 640), (0.3, 16, 2, 8, 4096), (0.6, 8, 20, 16, 1024), (0.9, 32, 5, 4, 320),
            (0.2, 8, 20, 4, 64), (0.01, 8, 20, 7, 2048)]
    ]
    root = pathlib.Path(__file__).resolve().parent.parent
    path = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else root / "tests/data/compress/scores.json"
    lines = [json.dumps(one, separators=(",", ":")) for one in cases + ada + pyramids]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
