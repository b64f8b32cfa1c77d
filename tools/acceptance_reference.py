#!/usr/bin/env python3
"""Agreement of compressed caches with the full one, computed without the engine, on the very texts that `vericache eval` measures.

    pip install numpy tokenizers
    build/vericache eval --model DIR --workload calls --contexts 16384 --documents 8 --answer-tokens 320 \\
        --compressor kivi:bits=2 --json eval.json
    python3 tools/acceptance_reference.py --model DIR --workload calls --context 16384 --documents 8 --answer-tokens 320 \\
        --method kivi:bits=2 --vericache build/vericache --eval eval.json
    python3 tools/acceptance_reference.py --model DIR --check

Nothing here knows the C++ code but for the dice that draw its prompts (eval_texts.py). The model runs in float32 with bf16 weights
and a bf16 KV cache. A prompt is read once and its KV compressed once, at its end: whole pages of 64 tokens, what is left stays exact.
Then the full cache's text is fed in one pass, whatever the compressed cache would have chosen, and each token that it chooses is
compared:

    drafts    the KV of the text is what drafts compute (CacheTrial::forced, what eval counts)
    verified  the KV of the text before a token is that of the full cache, as behind a verification (--verified)

Texts come from `vericache generate --compressor none`, or from greedy decoding here where no --vericache is given; --texts keeps
them in a file. --form and --tool draw other documents than eval does.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys
import tempfile

import numpy as np

from eval_texts import FORMS, TOOLS, code_prompt, distinct_8grams, mersenne64, records_prompt

PAGE = 64
CHUNK = 512  # rows of a pass
LEARNED = 2048  # queries that the rounding of keys is made from: the first ones
TILE = 128  # rows whose attention weights are held at once

# ---- model ----


def to_bf16(x):
    """float32 rounded to the nearest bf16, ties to even; finite values."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return (bits + (0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def read_safetensors(path):
    """name -> float32 array, of bf16 tensors."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    tensors = {}
    for name, entry in json.loads(raw[8:start]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            half = np.frombuffer(raw[start + begin : start + end], np.uint16).astype(np.uint32) << 16
            tensors[name] = half.view(np.float32).reshape(entry["shape"])
    return tensors


def attend(q, keys, values, first, own=None):
    """Softmax attention, grouped heads. q (rows, heads, dim), scaled; keys, values (kv_heads, tokens, dim); row i sees tokens
    [0, first + i]. own: keys and values (kv_heads, rows, dim) that stand in the place of token first + i for row i alone."""
    rows, heads, dim = q.shape
    group = heads // len(keys)
    out = np.empty_like(q)
    for h in range(len(keys)):
        for begin in range(0, rows, TILE):
            end = min(begin + TILE, rows)
            seen, own_rows = first + end, np.arange(begin, end)
            tile = q[begin:end, h * group : (h + 1) * group].reshape(-1, dim)
            weights = (tile @ keys[h, :seen].T).reshape(end - begin, group, seen)
            if own:
                weights[own_rows - begin, :, first + own_rows] = np.einsum(
                    "rgd,rd->rg", q[begin:end, h * group : (h + 1) * group], own[0][h, begin:end])
            weights[:, :, first + begin :][np.broadcast_to(
                (np.arange(end - begin) > np.arange(end - begin)[:, None])[:, None], (end - begin, group, end - begin))] = -np.inf
            weights -= weights.max(axis=-1, keepdims=True)
            np.exp(weights, out=weights)
            sums = weights.sum(axis=-1, keepdims=True)
            mixed = (weights.reshape(-1, seen) @ values[h, :seen]).reshape(end - begin, group, dim)
            if own:
                mixed += weights[own_rows - begin, :, first + own_rows][:, :, None] * (
                    own[1][h, begin:end] - values[h, first + own_rows])[:, None]
            out[begin:end, h * group : (h + 1) * group] = mixed / sums
    return out


class Llama:
    """A Llama (Touvron et al. 2023) with tied embeddings, from a Hugging Face directory."""

    def __init__(self, directory, bf16_arithmetic=False):
        c = json.loads((directory / "config.json").read_text())
        assert c["model_type"] == "llama" and c["tie_word_embeddings"] and not c["rope_scaling"]
        self.w = read_safetensors(directory / "model.safetensors")
        self.layers, self.heads, self.kv_heads, self.dim = (
            c["num_hidden_layers"], c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"])
        self.eps, self.eos = c["rms_norm_eps"], c["eos_token_id"]
        self.round = to_bf16 if bf16_arithmetic else lambda x: x  # of what every op gives
        half = self.dim // 2
        angles = np.arange(c["max_position_embeddings"])[:, None] * c["rope_theta"] ** (-np.arange(half) / half)
        self.cos, self.sin = (self.round(f(angles).astype(np.float32))[:, None] for f in (np.cos, np.sin))

    def norm(self, x, name):
        scale = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(self.eps))
        return self.round(self.round(x * scale) * self.w[name])

    def turned(self, x, position):
        """RoPE (Su et al. 2021), rotate-half: x (rows, heads, dim)."""
        cos, sin = self.cos[position : position + len(x)], self.sin[position : position + len(x)]
        low, high = x[..., : self.dim // 2], x[..., self.dim // 2 :]
        r = self.round
        return np.concatenate([r(r(low * cos) - r(high * sin)), r(r(high * cos) + r(low * sin))], axis=-1)

    def run(self, ids, position, attention):
        """Hidden states (rows, hidden) of ids at `position` and on. attention(layer, q, k, v): q (rows, heads, dim), scaled;
        k, v (kv_heads, rows, dim), bf16 as a cache holds them; gives (rows, heads, dim)."""
        r, w, x = self.round, self.w, self.w["model.embed_tokens.weight"][ids]
        for i in range(self.layers):
            p = f"model.layers.{i}."
            h = self.norm(x, p + "input_layernorm.weight")
            q, k, v = (r(h @ w[f"{p}self_attn.{n}_proj.weight"].T).reshape(len(ids), -1, self.dim) for n in "qkv")
            q = self.turned(q, position) * np.float32(self.dim**-0.5)
            k, v = (to_bf16(t.swapaxes(0, 1)) for t in (self.turned(k, position), v))
            out = r(attention(i, q, k, v)).reshape(len(ids), -1)
            x = r(x + r(out @ w[p + "self_attn.o_proj.weight"].T))
            h = self.norm(x, p + "post_attention_layernorm.weight")
            gate, up = (r(h @ w[f"{p}mlp.{n}_proj.weight"].T) for n in ("gate", "up"))
            x = r(x + r(r(r(gate / (1 + np.exp(-gate))) * up) @ w[p + "mlp.down_proj.weight"].T))
        return x

    def choose(self, hidden):
        """Greedy tokens (rows)."""
        return (self.norm(hidden, "model.norm.weight") @ self.w["model.embed_tokens.weight"].T).argmax(axis=-1)


class FullCache:
    """A prompt, read exactly, and what follows it. keys, values (layers, kv_heads, tokens, dim)."""

    def __init__(self, model, prompt, room, window):
        self.model, self.tokens, self.prompt_tokens = model, 0, len(prompt)
        self.keys, self.values = np.zeros((2, model.layers, model.kv_heads, len(prompt) + room, model.dim), np.float32)
        self.queries = np.zeros((model.layers, 0, model.heads, model.dim), np.float32)  # the last `window` of the prompt
        self.first_queries = self.queries  # LEARNED of them
        self.window = window
        for begin in range(0, len(prompt), CHUNK):
            self.last = self.feed(prompt[begin : begin + CHUNK], 1)[0]

    def feed(self, ids, choices=None):
        """What is chosen after the last `choices` of ids, or all."""
        queries = []

        def attention(layer, q, k, v):
            end = self.tokens + len(ids)
            self.keys[layer, :, self.tokens : end], self.values[layer, :, self.tokens : end] = k, v
            queries.append(q)
            return attend(q, self.keys[layer], self.values[layer], self.tokens)

        chosen = self.model.choose(self.model.run(ids, self.tokens, attention)[-(choices or len(ids)) :])
        self.tokens += len(ids)
        if self.tokens <= self.prompt_tokens:
            self.queries = np.concatenate([self.queries, queries], axis=1)[:, -self.window :]
            self.first_queries = np.concatenate([self.first_queries, queries], axis=1)[:, :LEARNED]
        return chosen.tolist()

    def greedy(self, tokens, stop):
        text = [self.last]
        while len(text) < tokens and text[-1] != stop:
            text += self.feed(text[-1:])
        return text

# ---- methods ----


def affine(x, bits, axis):
    """Asymmetric codes, a minimum and a step along the axis (KIVI, Liu et al. 2024, section 3.1), and back."""
    low, high = x.min(axis=axis, keepdims=True), x.max(axis=axis, keepdims=True)
    step = np.maximum((high - low) / (2**bits - 1), np.float32(1e-30))
    return np.rint((x - low) / step) * step + low


def kivi(cache, layer, end, key_bits, value_bits):
    """Keys per channel in groups of 64 tokens, values per token (section 3.2)."""
    keys, values = cache.keys[layer, :, :end], cache.values[layer, :, :end]
    groups = keys.reshape(len(keys), -1, PAGE, keys.shape[-1])
    return affine(groups, key_bits, 2).reshape(keys.shape), affine(values, value_bits, 2)


def hadamard(dim):
    """Blocks of the largest power of two that divides dim, orthogonal."""
    block = np.ones((1, 1), np.float32)
    while dim % (2 * len(block)) == 0:
        block = np.block([[block, block], [block, -block]])
    return np.kron(np.eye(dim // len(block), dtype=np.float32), block / np.float32(len(block) ** 0.5))


def ldlq(keys, bits, queries):
    """keys (tokens, dim) as affine() in groups of PAGE tokens, but the error of a channel is made up for by those before it, as
    far as queries (rows, dim) look at both alike (QuIP, Chee et al. 2023, section 3.1, with their second moment for the Hessian)."""
    moment = queries.T @ queries / len(queries)
    moment += 0.1 * np.trace(moment) / len(moment) * np.eye(len(moment), dtype=np.float32)
    lower = np.linalg.cholesky(moment.astype(np.float64))
    shares = (lower / np.diag(lower)).astype(np.float32)
    groups = keys.reshape(-1, PAGE, keys.shape[1])
    low = np.repeat(groups.min(axis=1), PAGE, axis=0)
    step = np.maximum((np.repeat(groups.max(axis=1), PAGE, axis=0) - low) / (2**bits - 1), np.float32(1e-30))
    out, errors = np.empty_like(keys), np.zeros_like(keys)
    for i in reversed(range(keys.shape[1])):
        wanted = keys[:, i] + errors[:, i + 1 :] @ shares[i + 1 :, i]
        out[:, i] = np.clip(np.rint((wanted - low[:, i]) / step[:, i]), 0, 2**bits - 1) * step[:, i] + low[:, i]
        errors[:, i] = keys[:, i] - out[:, i]
    return out


def quarot(cache, layer, end, key_bits, value_bits, nearest):
    """kivi of rotated vectors (Ashkboos et al. 2024, section 4.3); keys of up to 4 bits by ldlq(), unless to the nearest."""
    turn = hadamard(cache.model.dim)
    keys, values = cache.keys[layer, :, :end] @ turn, cache.values[layer, :, :end] @ turn
    if nearest or key_bits > 4:
        groups = keys.reshape(len(keys), -1, PAGE, keys.shape[-1])
        keys = affine(groups, key_bits, 2).reshape(keys.shape)
    else:
        group = cache.model.heads // len(keys)
        keys = np.stack([ldlq(k, key_bits, cache.learned[layer][:, h * group : (h + 1) * group].reshape(-1, len(turn)) @ turn)
                         for h, k in enumerate(keys)])
    return keys @ turn.T, affine(values, value_bits, 2) @ turn.T


def plane(cache, layer, end, bits):
    """Sign, exponent and the first bits - 5 of the 7 mantissa bits; the middle of what is cut off put back."""
    cut = 16 + 7 - (bits - 5)
    middle = np.uint32(1 << (cut - 1)) if cut > 16 else np.uint32(0)
    part = lambda x: (x.view(np.uint32) >> np.uint32(cut) << np.uint32(cut) | middle).view(np.float32)
    return tuple(part(np.ascontiguousarray(x[layer, :, :end])) for x in (cache.keys, cache.values))


def streaming_llm(cache, layer, end, window, sinks):
    """The first tokens and the last ones (Xiao et al. 2024, section 3)."""
    kept = np.r_[0:sinks, end - int(np.ceil(window * end)) : end]
    return cache.keys[layer][:, kept], cache.values[layer][:, kept]


def snapkv(cache, layer, end, budget, kernel):
    """Per KV head the tokens that the last queries of the prompt look at, pooled over neighbours (Li et al. 2024, section 4)."""
    rows, tokens = len(cache.queries[layer]), cache.prompt_tokens
    keys, values, kept = cache.keys[layer], cache.values[layer], int(np.ceil(budget * end))
    group = cache.model.heads // len(keys)
    chosen = []
    for h in range(len(keys)):
        logits = np.einsum("rgd,td->rgt", cache.queries[layer][:, h * group : (h + 1) * group], keys[h, :tokens], optimize=True)
        logits[np.broadcast_to((np.arange(tokens) > np.arange(tokens - rows, tokens)[:, None])[:, None], logits.shape)] = -np.inf
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        mass = (weights / weights.sum(axis=-1, keepdims=True)).sum(axis=(0, 1))[:end]
        scores = np.convolve(mass, np.ones(kernel) / kernel, "same")
        scores[end - rows :] = np.inf
        chosen.append(np.sort(np.argsort(-scores, kind="stable")[:kept]))
    return tuple(np.stack([x[h, chosen[h]] for h in range(len(keys))]) for x in (keys, values))


def compressor(spec):
    """compress(cache, layer, end) -> keys, values (kv_heads, kept, dim) for the first `end` tokens; specs as the engine's, and
    quarot:bits=3,rounding=nearest."""
    name, _, rest = spec.partition(":")
    options = {key: float(value) for key, value in re.findall(r"(\w+)=([\d.]+)", rest)}
    bits = int(options.get("bits", 8 if name == "plane" else 4))
    key_bits, value_bits = int(options.get("k", bits)), int(options.get("v", bits))
    nearest = "rounding=nearest" in rest
    methods = {
        "none": lambda cache, layer, end: (cache.keys[layer, :, :end], cache.values[layer, :, :end]),
        "kivi": lambda *at: kivi(*at, key_bits, value_bits),
        "quarot": lambda *at: quarot(*at, key_bits, value_bits, nearest),
        "plane": lambda *at: plane(*at, bits),
        "streaming-llm": lambda *at: streaming_llm(*at, options["window"], int(options.get("sinks", 4))),
        "snapkv": lambda *at: snapkv(*at, options.get("budget", 0.2), int(options.get("kernel", 7))),
    }
    return methods[name] if name in methods else sys.exit(f"'{spec}' is not here; there is: {', '.join(methods)}")


def forced(cache, compress, text, verified):
    """Teacher-forced choices in the places of text[1:], from the compressed prompt. `cache` has fed text[:-1]; verified: rows see
    its KV of the tokens before them."""
    model, prompt = cache.model, cache.prompt_tokens
    whole = prompt // PAGE * PAGE

    def attention(layer, q, k, v):
        kept_keys, kept_values = compress(cache, layer, whole)
        exact = slice(whole, prompt + len(text) - 1 if verified else prompt)
        parts = [[kept_keys, cache.keys[layer, :, exact]], [kept_values, cache.values[layer, :, exact]]]
        first = kept_keys.shape[1] + prompt - whole
        if verified:
            return attend(q, *(np.concatenate(p, axis=1) for p in parts), first, (k, v))
        return attend(q, *(np.concatenate([*p, x], axis=1) for p, x in zip(parts, (k, v))), first)

    return model.choose(model.run(text[:-1], prompt, attention)).tolist()

# ---- measurement ----


def full_text(args, model, tokenizer, prompt, most):
    """The full cache's greedy tokens, `most` or up to and with the end token of an answer: the engine's, or the model's here."""
    stop = None if args.workload == "code" else model.eos
    text = tokenizer.decode(prompt, skip_special_tokens=False)
    if not args.vericache or tokenizer.encode(text).ids != prompt:  # a prompt that is cut within a character has no text
        return FullCache(model, prompt, most, 1).greedy(most, stop)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(text)
        file.flush()
        command = [args.vericache, "generate", "--model", args.model, "--prompt-file", file.name, "--compressor", "none",
                   "--temperature", "0", "--max-tokens", str(most), "--json"] + ["--ignore-eos"] * (stop is None)
        got = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    assert got["prompt_tokens"] == len(prompt), "the engine reads the same prompt"
    return got["tokens"]


def read_texts(args, model):
    """[{"ids": prompt, "full": the full cache's text}], from the file if it is there."""
    if args.texts and args.texts.exists():
        return [json.loads(line) for line in args.texts.read_text().splitlines()]
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    encode, texts = lambda text: tokenizer.encode(text).ids, []
    for i in range(args.documents):
        if args.workload == "code":
            ids, most = code_prompt(args.source, i, args.documents, args.context, encode), args.answer_tokens
        else:
            ids, most = records_prompt(args.seed + i, args.workload, args.context, encode, args.form, args.tool)
        texts.append({"ids": ids, "full": full_text(args, model, tokenizer, ids, min(most, args.answer_tokens))})
        print(f"text {i + 1} of {args.documents}: {len(ids)} + {len(texts[-1]['full'])} tokens", file=sys.stderr, flush=True)
    if args.texts:
        args.texts.write_text("".join(json.dumps(text) + "\n" for text in texts))
    return texts


def share(agreed, judged):
    """Percent of all tokens, and its standard error over prompts."""
    agreed, judged = np.array(agreed, float), np.array(judged, float)
    mean = agreed.sum() / judged.sum()
    error = np.sqrt(np.sum((agreed - mean * judged) ** 2) / max(len(judged) - 1, 1) * len(judged)) / judged.sum()
    return 100 * mean, 100 * error


def measure(args):
    model = Llama(args.model, args.arithmetic == "bf16")
    texts = read_texts(args, model)
    if not args.method:
        return
    methods = {spec: compressor(spec) for spec in args.method}
    agreed = {(spec, verified): [] for spec in methods for verified in (False, True)[: 1 + args.verified]}
    judged, learned = [], None
    for number, text in enumerate(texts):
        prompt, full = text["ids"], text["full"]
        cache = FullCache(model, prompt, len(full), args.window)
        learned = cache.first_queries if learned is None else learned
        cache.learned = learned  # as an engine does, once
        right = lambda choices: sum(a == b for a, b in zip(choices, full[1:], strict=True))
        whole = right(cache.feed(full[:-1]))
        judged.append(len(full) - 1)
        for (spec, verified), counts in agreed.items():
            counts.append(right(forced(cache, methods[spec], full, verified)))
        line = ", ".join(f"{spec} {agreed[spec, False][-1]}" for spec in methods)
        print(f"prompt {number + 1} of {len(texts)}: {judged[-1]} tokens, full cache {whole}, {line}", file=sys.stderr, flush=True)
    engine = {}
    if args.eval:
        cells = [c for c in json.loads(args.eval.read_text())["cells"]
                 if c["workload"] == args.workload and c["context"] == args.context and c["temperature"] == 0]
        same = distinct_8grams([text["full"] for text in texts])
        assert all(c["judged"] == sum(judged) and abs(c["distinct_8gram_share"] - same) < 1e-9 for c in cells), "eval read other texts"
        engine = {c["compressor"]: 100 * c["agreement"] for c in cells}
    print(f"{args.workload} at {args.context}, {len(texts)} prompts, {sum(judged)} tokens judged, "
          f"{100 * distinct_8grams([text['full'] for text in texts]):.1f} % distinct 8-grams, {args.arithmetic} arithmetic")
    print(f"{'method':32}{'KV of text':12}{'agree %':>8}{'+-':>6}{'eval %':>8}   agreeing tokens by prompt")
    for (spec, verified), counts in agreed.items():
        ours = f"{engine[spec]:.1f}" if spec in engine and not verified else "-"
        print("{:32}{:12}{:8.1f}{:6.1f}{:>8}   {}".format(
            spec, "verified" if verified else "drafts", *share(counts, judged), ours, counts))


def check(args):
    """The model here against golden/ (transformers in float32), where that is not in doubt between two tokens."""
    model = Llama(args.model)
    doubt = 0.1  # of logits: what bf16 keys and values may change
    for golden in json.loads((args.model / "golden/golden.json").read_text()):
        wanted = golden["greedy_ids"]
        cache = FullCache(model, golden["prompt_ids"], len(wanted), 1)
        chosen = [cache.last] + cache.feed(wanted[:-1])
        wrong = [i for i, (a, b, margin) in enumerate(zip(chosen, wanted, golden["margins"])) if a != b and margin > doubt]
        assert not wrong, f"{golden['name']}: tokens {wrong} are not the golden ones"
        nothing_lost = forced(cache, compressor("none"), wanted, False), forced(cache, compressor("none"), wanted, True)
        assert all(a == chosen[1:] for a in nothing_lost), f"{golden['name']}: the uncompressed cache is not the full one"
        print(f"{golden['name']}: {sum(a == b for a, b in zip(chosen, wanted))} of {len(wanted)} tokens are the golden ones")
    fib = json.loads((args.model / "golden/golden.json").read_text())[3]
    assert FullCache(model, fib["prompt_ids"], 96, 1).greedy(96, None) == fib["greedy_ids"], "token by token"
    assert next(mersenne64(5489)) == 14514284786278117030, "std::mt19937_64"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--check", action="store_true", help="compare the model here with the checkpoint's golden/ and end")
    parser.add_argument("--workload", choices=["calls", "export", "code"], default="calls")
    parser.add_argument("--context", type=int, default=4096, help="most tokens of a prompt")
    parser.add_argument("--documents", type=int, default=8, help="prompts")
    parser.add_argument("--seed", type=int, default=0, help="prompt i takes seed + i, as in eval")
    parser.add_argument("--answer-tokens", type=int, default=320, help="most tokens of a text; of code, all")
    parser.add_argument("--source", type=pathlib.Path, help="directory that code is read from, as in eval")
    parser.add_argument("--form", choices=FORMS, help="of all records (default: drawn, as in eval)")
    parser.add_argument("--tool", choices=list(TOOLS), help="the one that is declared (default: drawn, as in eval)")
    parser.add_argument("--method", action="append", default=[],
                        help="compressor, as for the engine; may be given again (default: none, only --texts is written)")
    parser.add_argument("--verified", action="store_true", help="count both ways")
    parser.add_argument("--window", type=int, default=32, help="queries that vote in snapkv")
    parser.add_argument("--arithmetic", choices=["float32", "bf16"], default="float32", help="bf16: what every op gives is rounded")
    parser.add_argument("--vericache", help="the engine's binary, which decodes the full cache's texts (default: the model here)")
    parser.add_argument("--texts", type=pathlib.Path, help="file of prompts and full texts, a JSON object a line; written if new")
    parser.add_argument("--eval", type=pathlib.Path, help="what `vericache eval --json` wrote, to stand beside it")
    args = parser.parse_args()
    check(args) if args.check else measure(args)


if __name__ == "__main__":
    main()
