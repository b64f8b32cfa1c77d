#!/usr/bin/env python3
"""Agreement of compressed caches with the full one, computed without the engine, on the very texts that `vericache eval` measures.

    pip install numpy tokenizers
    vericache eval --model DIR --workload calls --contexts 16384 --documents 8 --answer-tokens 320 --compressor kivi:bits=2 --json eval.json
    python3 tools/acceptance_reference.py --model DIR --workload calls --context 16384 --vericache build/vericache \\
        --method kivi:bits=2 --eval eval.json
    python3 tools/acceptance_reference.py --model DIR --check

Nothing here knows the C++ code but for the dice that draw its prompts. The model runs in float32 with bf16 weights and a bf16 KV
cache. A prompt is read once and its KV compressed once, at its end: whole pages of 64 tokens, what is left stays exact. Then the
full cache's text is fed in one pass, whatever the compressed cache would have chosen, and each token that it chooses is compared:

    drafts    the KV of the text is what drafts compute (CacheTrial::forced, what eval counts)
    verified  the KV of the text before a token is that of the full cache (as behind a verification)

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

PAGE = 64
CHUNK = 512  # rows of a pass
TILE = 128  # rows whose attention weights are held at once

# ---- texts ----

SYLLABLES = ("ka mi ro ten va lu shi or en da bel tor ni sa gre mon ul fa rin kel os ta pe wi zan dor el ha jo by ce qua ist "
             "um").split()
CITIES = "Oslo Lima Kyoto Porto Turin Basel Quito Perth Delft Ghent Malmo Busan Hanoi Cairo Tunis Accra Leeds Omaha Boise Tampa".split()
STATES = ["shipped", "pending", "paid", "refunded", "lost", "held"]
TOOLS = {  # parameters, and how a user asks for it
    "refund_order": (["order_id", "email", "amount"], "Refund order"),
    "ship_order": (["order_id", "city", "customer"], "Ship order"),
    "notify_customer": (["email", "status"], "Notify the customer of order"),
    "update_record": (["order_id", "status", "code"], "Update the record of order"),
    "open_ticket": (["customer", "order_id", "code"], "Open a ticket for order"),
}
FORMS = ["text", "json", "csv"]
ENDINGS = {".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".js", ".ts", ".jsx", ".tsx"}
U64 = (1 << 64) - 1


def mersenne64(seed):
    """std::mt19937_64 (Nishimura 2000), number by number."""
    state = [seed]
    for i in range(1, 312):
        state.append((6364136223846793005 * (state[-1] ^ state[-1] >> 62) + i) & U64)
    while True:
        for i in range(312):
            x = state[i] & ~0x7FFFFFFF | state[(i + 1) % 312] & 0x7FFFFFFF
            state[i] = state[(i + 156) % 312] ^ x >> 1 ^ (0xB5026F5AA96619E9 if x & 1 else 0)
        for x in state:
            x ^= x >> 29 & 0x5555555555555555
            x ^= x << 17 & 0x71D67FFFEDA60000
            x ^= x << 37 & 0xFFF7EEE000000000
            yield x ^ x >> 43


class Dice:
    """src/text/record_rows.h."""

    def __init__(self, seed, stream):
        x = (seed + stream * 0x9E3779B97F4A7C15) & U64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & U64
        x = (x ^ x >> 27) * 0x94D049BB133111EB & U64
        self.numbers = mersenne64(x ^ x >> 31)

    def below(self, n):
        return (next(self.numbers) >> 32) * n >> 32

    def between(self, least, most):
        return least + self.below(most - least + 1)

    def one_of(self, values):
        return values[self.below(len(values))]

    def sample(self, n, count):
        places = list(range(n))
        for i in range(count):
            j = self.between(i, n - 1)
            places[i], places[j] = places[j], places[i]
        return places[:count]


def draw_records(seed, count):
    dice, used, records = Dice(seed, 2), set(), []
    name = lambda: "".join(dice.one_of(SYLLABLES) for _ in range(dice.between(2, 3)))
    for _ in range(count):
        order_id = dice.between(10000, 99999)
        while order_id in used:
            order_id = dice.between(10000, 99999)
        used.add(order_id)
        first, last, company = name(), name(), name()
        records.append({
            "order_id": str(order_id),
            "customer": f"{first.capitalize()} {last.capitalize()}",
            "email": f"{first}.{last}@{company}.example",
            "city": dice.one_of(CITIES),
            "amount": dice.between(100, 99900) / 100,
            "status": dice.one_of(STATES),
            "code": "".join("0123456789abcdef"[dice.below(16)] for _ in range(8)),
        })
    return records


def row(record, form):
    if form == "json":
        return json.dumps(record)
    if form == "csv":
        return ",".join(str(value) for value in record.values())
    rest = " ".join(f"{key}={value}" for key, value in record.items() if key != "order_id")
    return f"order {record['order_id']}: {rest}"


def records_document(seed, records, workload, form=None, tool=None):
    """(prompt, right answer), as src/text/records.cc draws them; `form` and `tool` overrule the dice."""
    frame, turn = Dice(seed, 1), Dice(seed, 3)
    drawn_form = FORMS[frame.below(3)]
    form = form or drawn_form
    tools = [list(TOOLS)[i] for i in frame.sample(len(TOOLS), frame.between(2, len(TOOLS)))]
    tools = [tool] if tool else tools
    prompt = "<|system|>\nTools:\n"
    prompt += "".join(json.dumps({"name": t, "parameters": TOOLS[t][0]}) + "\n" for t in tools) + "<|end|>\n<|user|>\n"
    prompt += ",".join(records[0]) + "\n" if form == "csv" else ""
    prompt += "".join(row(r, form) + "\n" for r in records)
    if workload == "calls":
        called = turn.one_of(tools)
        parameters, verb = TOOLS[called]
        asked = [records[i] for i in turn.sample(len(records), min(len(records), 12))]
        prompt += f"{verb}s {', '.join(r['order_id'] for r in asked)}."
        answer = [json.dumps({"name": called, "arguments": {key: r[key] for key in parameters}}) for r in asked]
    else:
        exported = min(len(records), 14)
        first = turn.between(0, len(records) - exported)
        prompt += f"List the {exported} records from order {records[first]['order_id']} as JSON."
        answer = [row(r, "json") for r in records[first : first + exported]]
    return prompt + "<|end|>\n<|assistant|>\n", "\n".join(answer)


def records_prompt(seed, workload, context, encode, form, tool):
    """The prompt of at most `context` tokens that has more with one record more: (ids, most tokens of an answer)."""
    records = draw_records(seed, context // 8)
    document = lambda count: records_document(seed, records[:count], workload, form, tool)
    fits, beyond = 1, len(records) + 1
    while beyond - fits > 1:
        middle = (fits + beyond) // 2
        fits, beyond = (middle, beyond) if len(encode(document(middle)[0])) <= context else (fits, middle)
    prompt, answer = document(fits)
    return encode(prompt), len(encode(answer)) + 16


def code_prompt(root, index, count, context, encode):
    """`context` tokens of the files of `root` from the index-th of count places on (apps/source_tree.cc)."""
    files = [path for path in root.rglob("*") if path.suffix in ENDINGS and path.is_file() and 0 < path.stat().st_size <= 1 << 20
             and not any(part[0] == "." or part in ("site-packages", "dist-packages", "node_modules", "__pycache__")
                         for part in path.relative_to(root).parts[:-1])]
    files.sort(key=lambda path: path.parts)
    ids = []
    for i in range(len(files)):
        path = files[(len(files) * index // count + i) % len(files)]
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError:
            continue
        ids += encode(f"<|file|>{path.relative_to(root)}\n{text}")
        if len(ids) >= context:
            return ids[:context]
    sys.exit(f"{root} has {len(ids)} tokens of source, too few for {context}")


def distinct_8grams(texts):
    grams = [tuple(text[i : i + 8]) for text in texts for i in range(len(text) - 7)]
    return len(set(grams)) / max(len(grams), 1)

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
        self.window = window
        for begin in range(0, len(prompt), CHUNK):
            self.last = self.feed(prompt[begin : begin + CHUNK])[-1]

    def feed(self, ids):
        """What is chosen after each of ids."""
        queries = []

        def attention(layer, q, k, v):
            end = self.tokens + len(ids)
            self.keys[layer, :, self.tokens : end], self.values[layer, :, self.tokens : end] = k, v
            queries.append(q[-self.window :])
            return attend(q, self.keys[layer], self.values[layer], self.tokens)

        chosen = self.model.choose(self.model.run(ids, self.tokens, attention))
        self.tokens += len(ids)
        if self.tokens <= self.prompt_tokens:
            self.queries = np.concatenate([self.queries, queries], axis=1)[:, -self.window :]
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
    """compress(cache, layer, end) -> keys, values (kv_heads, kept, dim) for the first `end` tokens; specs as the engine's."""
    name, _, rest = spec.partition(":")
    options = {key: float(value) for key, value in re.findall(r"(\w+)=([\d.]+)", rest)}
    bits = int(options.get("bits", 8 if name == "plane" else 4))
    key_bits, value_bits = int(options.get("k", bits)), int(options.get("v", bits))
    methods = {
        "none": lambda cache, layer, end: (cache.keys[layer, :, :end], cache.values[layer, :, :end]),
        "kivi": lambda *at: kivi(*at, key_bits, value_bits),
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
    methods = {spec: compressor(spec) for spec in args.method}
    agreed = {(spec, verified): [] for spec in methods for verified in (False, True)}
    judged = []
    for number, text in enumerate(texts):
        prompt, full = text["ids"], text["full"]
        cache = FullCache(model, prompt, len(full), args.window)
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
    print(f"{'method':28}{'eval':>8}{'drafts':>10}{'+-':>6}{'verified':>10}{'+-':>6}   agreeing drafts by prompt")
    for spec in methods:
        ours = f"{engine[spec]:.1f}" if spec in engine else "-"
        drafts, behind = (share(agreed[spec, verified], judged) for verified in (False, True))
        print(f"{spec:28}{ours:>8}{drafts[0]:10.1f}{drafts[1]:6.1f}{behind[0]:10.1f}{behind[1]:6.1f}   {agreed[spec, False]}")


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
    parser.add_argument("--method", action="append", default=[], help="compressor, as for the engine; may be given again")
    parser.add_argument("--window", type=int, default=32, help="queries that vote in snapkv")
    parser.add_argument("--arithmetic", choices=["float32", "bf16"], default="float32", help="bf16: what every op gives is rounded")
    parser.add_argument("--vericache", help="the engine's binary, which decodes the full cache's texts (default: the model here)")
    parser.add_argument("--texts", type=pathlib.Path, help="file of prompts and full texts, a JSON object a line; written if new")
    parser.add_argument("--eval", type=pathlib.Path, help="what `vericache eval --json` wrote, to stand beside it")
    args = parser.parse_args()
    check(args) if args.check else measure(args)


if __name__ == "__main__":
    main()
