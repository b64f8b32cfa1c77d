#!/usr/bin/env python3
"""Holds the tokenizer against the `tokenizers` package (PyPI).

build:   makes the small tokenizers and their cases of tests/data/text/ (committed; read by tests/text/)
compare: runs random and adversarial strings, 100,000 in all, through build/tests/tokenizer_compare, and random lists of
         ids, and reports every difference in ids or text

    python3 -m venv venv && venv/bin/pip install tokenizers
    venv/bin/python tools/make_tokenizer_vectors.py build
    venv/bin/python tools/make_tokenizer_vectors.py compare --binary build/tests/tokenizer_compare \\
        --also build/models/vericode-26m/tokenizer.json
"""

import argparse
import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import unicodedata

from tokenizers import Tokenizer, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

DATA = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests", "data", "text")

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|\d{1,3}|[\S]|\P{L}"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

CORPUS = [
    "The quick brown fox doesn't jump over the lazy dog; it's asleep, and they're waiting. We'll see what I've got!",
    "def merge(self, left: int, right: int) -> int:\n    return self.ranks.get((left, right), -1)\n\n\tif x == 10:\n",
    "for (size_t i = 0; i < count; ++i) {\n  total += values[i] * 0.5f;  // 1234567890\n}\r\n\r\n",
    '{"name": "vericache", "tokens": [1, 22, 333, 4444], "nested": {"true": null}}',
    "Der schnelle braune Fuchs springt über den faulen Hund. Größe, Äpfel, Straße, Übermut.",
    "Le cœur déçu mais l'âme plutôt naïve, Louÿs rêva de crapaüter en canoë au delà des îles.",
    "Быстрая коричневая лиса перепрыгивает через ленивую собаку. Съешь ещё этих мягких булок.",
    "Η γρήγορη καφετιά αλεπού πηδάει πάνω από το τεμπέλικο σκυλί. Ωμέγα.",
    "素早い茶色の狐がのろまな犬を飛び越える。日本語テキスト。敏捷的棕色狐狸跳过了懒狗。",
    "빠른 갈색 여우가 게으른 개를 뛰어넘는다. 다람쥐 헌 쳇바퀴에 타고파.",
    "الثعلب البني السريع يقفز فوق الكلب الكسول. तेज भूरी लोमड़ी आलसी कुत्ते के ऊपर कूदती है।",
    "🙂👍🏽 👨‍👩‍👧‍👦 🇩🇪 ❤️ 2024-06-30 12:34:56 3.14159 1,000,000 a@b.org https://example.org/x?y=z#w",
    "THE QUICK BROWN FOX ISN'T HERE. WE'RE DONE. I'LL GO.   many    spaces\n\n\nand lines\t\ttabs",
]


def added(content, id_, **flags):
    token = {"id": id_, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": False}
    token.update(flags)
    return token


def added_tokens(vocabulary):
    """One of each behaviour; those that the vocabulary does not have are numbered from its end."""
    flags = {
        "<|end|>": dict(special=True),
        "<|end|>>": {},
        "<|left|>": dict(special=True, lstrip=True),
        "<|right|>": dict(special=True, rstrip=True),
        "<|both|>": dict(lstrip=True, rstrip=True),
        "word": dict(single_word=True),
        "solo": dict(single_word=True, normalized=True),
        "né": dict(normalized=True),
        "e\u0301te\u0301": dict(normalized=True),
        "<norm>": dict(normalized=True, lstrip=True, rstrip=True, special=True),
        "\t\t": {},
    }
    fresh = iter(range(len(vocabulary), len(vocabulary) + len(flags)))
    return [added(content, vocabulary[content] if content in vocabulary else next(fresh), **f) for content, f in flags.items()]


def as_json(tokenizer):
    return json.loads(tokenizer.to_str())


def train(tokenizer, vocab_size, special=(), alphabet=()):
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(special), show_progress=False,
                                  initial_alphabet=list(alphabet), min_frequency=1)
    tokenizer.train_from_iterator(CORPUS * 2, trainer)
    return as_json(tokenizer)


def byte_level(pre_tokenizer, normalizer=None, vocab_size=620):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    made = train(tokenizer, vocab_size, alphabet=pre_tokenizers.ByteLevel.alphabet())
    made["added_tokens"] = added_tokens(made["model"]["vocab"])
    return made


def split_then_bytes(pattern, **kwargs):
    return byte_level(pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"),
                                               pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]), **kwargs)


def bos_template(token, id_, eos=None):
    single = [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    tokens = {token: {"id": token, "ids": [id_], "tokens": [token]}}
    if eos is not None:
        single.append({"SpecialToken": {"id": eos[0], "type_id": 0}})
        tokens[eos[0]] = {"id": eos[0], "ids": [eos[1]], "tokens": [eos[0]]}
    return {"type": "TemplateProcessing", "single": single,
            "pair": single + [{"Sequence": {"id": "B", "type_id": 1}}], "special_tokens": tokens}


def gpt2():
    made = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
    made["model"]["merges"] = [" ".join(pair) for pair in made["model"]["merges"]]
    return made


def gpt2_prefix():
    return byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True))


def llama3():
    made = split_then_bytes(LLAMA3, vocab_size=700)
    # Words without their last merge: only ignore_merges reaches them.
    made["model"]["merges"] = [pair for i, pair in enumerate(made["model"]["merges"]) if i < 100 or i % 3]
    known = set(made["model"]["vocab"])
    made["model"]["merges"] = [pair for pair in made["model"]["merges"] if "".join(pair) in known]
    made["model"]["ignore_merges"] = True
    end = made["added_tokens"][0]
    made["post_processor"] = {"type": "Sequence", "processors": [
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
        bos_template(end["content"], end["id"])]}
    return made


def qwen2():
    return split_then_bytes(QWEN2, normalizer=normalizers.NFC())


def mixed():
    """Every behaviour of Split, and Digits, before bytes; the spaces before the words show where they begin."""
    made = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
    made["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"String": ","}, "behavior": "MergedWithPrevious", "invert": False},
        {"type": "Split", "pattern": {"Regex": "[-_]"}, "behavior": "MergedWithNext", "invert": False},
        {"type": "Split", "pattern": {"String": "~"}, "behavior": "Removed", "invert": False},
        {"type": "Split", "pattern": {"Regex": r"\p{Lu}"}, "behavior": "Contiguous", "invert": False},
        {"type": "Split", "pattern": {"Regex": r"[^;]+"}, "behavior": "Removed", "invert": True},
        {"type": "Split", "pattern": {"Regex": r"(?<=x)y*"}, "behavior": "Isolated", "invert": False},
        {"type": "Digits", "individual_digits": False},
        {"type": "Sequence", "pretokenizers": [
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False}]}]}
    made["normalizer"] = {"type": "Replace", "pattern": {"Regex": "[`´]+"}, "content": "'"}
    return made


def digits():
    made = split_then_bytes(QWEN2)
    made["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Digits", "individual_digits": True})
    return made


def seams(*steps):
    """Bytes without merges, and a space before every word: the ids show where the text was split."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    made = as_json(tokenizer)
    made["added_tokens"] = added_tokens(made["model"]["vocab"])
    return made


def split_seams(pattern):
    return seams(pre_tokenizers.Split(Regex(pattern), "isolated"))


SENTENCEPIECE_DECODER = {"type": "Sequence", "decoders": [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}


def sentencepiece(byte_fallback=True):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>"] + ([f"<0x{b:02X}>" for b in range(256)] if byte_fallback else [])
    made = train(tokenizer, 800 if byte_fallback else 560, special=special)
    model = made["model"]
    model.update(byte_fallback=byte_fallback, fuse_unk=True, unk_token="<unk>")
    made["pre_tokenizer"] = None
    made["added_tokens"] = [added(t, i, special=True) for i, t in enumerate(special[:3])]
    made["added_tokens"] += added_tokens(model["vocab"])
    made["post_processor"] = bos_template("<s>", 1)
    made["decoder"] = SENTENCEPIECE_DECODER
    return made


def metaspace_seams():
    """Only what begins the text gets a mark: not the words behind a split."""
    made = sentencepiece()
    tokens = ["<unk>", "<s>", "</s>", "▁"] + [f"<0x{b:02X}>" for b in range(256)]
    made["model"].update(vocab={t: i for i, t in enumerate(tokens)}, merges=[])
    made["added_tokens"] = [added(t, i, special=True) for i, t in enumerate(tokens[:3])]
    made["added_tokens"] += added_tokens(made["model"]["vocab"])
    made["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"String": "a"}, "behavior": "Removed", "invert": False},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}]}
    return made


def llama2():
    made = sentencepiece()
    made["normalizer"] = {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}
    made["model"]["merges"] = [" ".join(pair) for pair in made["model"]["merges"]]
    return made


def metaspace_first():
    made = sentencepiece()
    made["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    made["post_processor"] = bos_template("<s>", 1, eos=("</s>", 2))
    return made


def metaspace_always():
    """The older Metaspace form, unknown characters instead of bytes, and the Metaspace decoder."""
    made = sentencepiece(byte_fallback=False)
    made["model"]["fuse_unk"] = False
    made["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}
    made["decoder"] = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}
    return made


FAMILIES = {
    "gpt2": gpt2, "gpt2_prefix": gpt2_prefix, "llama3": llama3, "qwen2": qwen2, "mixed": mixed, "digits": digits,
    "gpt2_seams": lambda: split_seams(GPT2), "llama3_seams": lambda: split_seams(LLAMA3),
    "qwen2_seams": lambda: split_seams(QWEN2), "cased_seams": lambda: split_seams(CASED),
    "digits_seams": lambda: seams(pre_tokenizers.Digits(individual_digits=False)),
    "metaspace_seams": metaspace_seams,
    "llama2": llama2, "metaspace_first": metaspace_first, "metaspace_always": metaspace_always,
}

SPACES = [" ", "  ", "   ", "\t", "\n", "\r\n", "\r", "\n\n", "\u00a0", "\u0085", "\u2003", "\u3000", "\u2028", "\u200b",
          "\u180e", "\u1680", "\x0b", "\x0c", "\ufeff"]
CONTRACTIONS = ["'s", "'S", "'t", "'T", "'re", "'RE", "'Re", "'ve", "'VE", "'m", "'M", "'ll", "'LL", "'lL", "'d", "'D", "'ſ",
                "'ſs", "’s", "'K", "'k", "''s", "'sſ", "don't", "IT'S", "we'Ve"]
MARKS = ["\u0301", "\u0300", "\u0323", "\u0308", "\u0334", "\u0345", "\u0327", "\u20dd", "\ufe0f", "\u200d", "\u093c", "\u05b0",
         "\u3099", "\u1ab0", "\u0f71", "\u0344", "\u08d3", "\u1df6", "\u0897"]
ODD = ["ſ", "K", "Å", "ß", "ẞ", "İ", "ı", "ﬁ", "ﬆ", "ǆ", "Ω", "ö", "o\u0308", "Ệ", "한", "\u1112\u1161\u11ab", "\u1100\u1161",
       "²", "½", "Ⅷ", "٣", "९", "①", "𝟗", "々", "ー", "▁", "▁▁", "Ġ", "Ċ", "ĉ", "\x00", "\x01", "\x7f", "\u0080", "\ud7ff",
       "\ue000", "\ufffd", "\ufffe", "\uffff", "\U0010ffff", "\U0001f468\u200d\U0001f469\u200d\U0001f467",
       "\U0001f44d\U0001f3fd", "\U0001f1e9\U0001f1ea", "\u0958", "\u2126", "\u212b", "\U0001d15e", "\U00011938", "\U000105d2\u0307",
       "\u0149", "\u1f80", "\uac00\u11a8", "\u0cca", "\U000110ab"]
TOKENS = ["<|end|>", "<|end|>>", "<|left|>", "<|right|>", "<|both|>", "word", "solo", "né", "ne\u0301", "e\u0301te\u0301", "été",
          "<norm>", "\t\t", "<s>", "</s>", "<unk>", "<0x41>", "<0x+A>", "<|file|>", "<|endoftext|>", "<|tool|>", "▁word",
          "▁solo", "▁<norm>"]
PLANES = [(0x20, 0x7F), (0x20, 0x7F), (0x80, 0x250), (0x250, 0x530), (0x300, 0x370), (0x530, 0x1100), (0x1100, 0x2000),
          (0x2000, 0x3040), (0x3040, 0xA000), (0xA000, 0xD800), (0xE000, 0x10000), (0x10000, 0x12000), (0x12000, 0x1F000),
          (0x1F000, 0x20000), (0x20000, 0x32400), (0xE0000, 0xE0200), (0, 0xD800), (0x10000, 0x110000)]


class Strings:
    """Random and adversarial strings, the same for the same seed."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.words = " ".join(CORPUS).split()
        self.makers = [self.word, self.word, self.corpus_slice, self.space, self.space, self.contraction, self.number, self.odd,
                       self.mark_run, self.token, self.token, self.partial_token, self.code_points, self.repeat, self.ascii]

    def word(self):
        word = self.rng.choice(self.words)
        return self.rng.choice([word, word.upper(), word.capitalize(), " " + word])

    def corpus_slice(self):
        text = self.rng.choice(CORPUS)
        begin = self.rng.randrange(len(text))
        return text[begin:begin + self.rng.randrange(1, 30)]

    def space(self):
        return "".join(self.rng.choice(SPACES) for _ in range(self.rng.choice([1, 1, 1, 2, 3, 6])))

    def contraction(self):
        return self.rng.choice(CONTRACTIONS)

    def number(self):
        return "".join(self.rng.choice("0123456789") for _ in range(self.rng.randrange(1, 9)))

    def odd(self):
        return self.rng.choice(ODD)

    def mark_run(self):
        return self.rng.choice(["a", "e", "o", "", "が", "ｶ"]) + "".join(
            self.rng.choice(MARKS) for _ in range(self.rng.randrange(1, 6)))

    def token(self):
        token = self.rng.choice(TOKENS)
        return self.rng.choice([token, token, token, " " + token + " ", "a" + token, token + "b", "  " + token + "\n", token * 2])

    def partial_token(self):
        token = self.rng.choice(TOKENS)
        return token[:self.rng.randrange(len(token))] if self.rng.random() < 0.5 else token[self.rng.randrange(len(token)):]

    def code_points(self):
        first, last = self.rng.choice(PLANES)
        out = []
        for _ in range(self.rng.randrange(1, 6)):
            c = self.rng.randrange(first, last)
            if not 0xD800 <= c < 0xE000:
                out.append(chr(c))
        return "".join(out)

    def repeat(self):
        unit = self.rng.choice(["a", " ", "\n", "=", "-", "0", "ab", "\u0301", "é", "🙂", "'s", "\t", "_x", "ー", "~", ";"])
        return unit * self.rng.choice([2, 3, 5, 8, 17, 40, 100])

    def ascii(self):
        return "".join(chr(self.rng.randrange(0x20, 0x7F)) for _ in range(self.rng.randrange(1, 12)))

    def make(self):
        return "".join(self.rng.choice(self.makers)() for _ in range(self.rng.choice([0, 1, 1, 2, 3, 4, 6, 10])))


def expected(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    special = tokenizer.encode(text, add_special_tokens=True).ids
    return ids, special, tokenizer.decode(special, skip_special_tokens=False), tokenizer.decode(special)


def every_character():
    """Each code point beside letters, so that a difference in any Unicode table shows; 64 to a string."""
    points = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000 and unicodedata.category(chr(c)) != "Co"]
    for i in range(0, len(points), 64):
        yield "".join("a" + chr(c) + "1word" + chr(c) + " " + chr(c) + "." for c in points[i:i + 64])


# Letters, digits and marks that came after Unicode 14, when PCRE2's tables were made, and marks that came after Unicode 9,
# when those of the package's NFC were.
RECENT = [0x1C89, 0xA7CD, 0xA7DB, 0x10D40, 0x10D50, 0x10D70, 0x10D6F, 0x10EC2, 0x116D0, 0x11BC0, 0x11F04, 0x11F50, 0x13460, 0x16D40,
          0x1CCF0, 0x1D2C0, 0x1DF25, 0x1E030, 0x1E4D0, 0x1E4F0, 0x2B739, 0x2EBF0, 0x31350, 0x323AF, 0x0897, 0x0CF3, 0x1E08F, 0x08D3,
          0x1AC1, 0x11DE0, 0x16FF4, 0x180E, 0x0085, 0x3000]


def recent_characters():
    for c in RECENT:
        yield "ab" + chr(c) + "1" + chr(c) + " " + chr(c) + "\u0323\u0301" + chr(c) + ".'ſ\n" + chr(c) + "word" + chr(c)


def random_ids(seed, size, count):
    rng = random.Random(seed)
    for _ in range(count):
        yield [rng.randrange(size + 3) for _ in range(rng.randrange(24))]


def build(args):
    os.makedirs(DATA, exist_ok=True)
    total = 0
    for number, (name, make) in enumerate(FAMILIES.items()):
        made = make()
        with open(os.path.join(DATA, name + ".json"), "w", encoding="utf-8") as out:
            json.dump(made, out, ensure_ascii=False, separators=(",", ":"))
        tokenizer = Tokenizer.from_str(json.dumps(made))
        source, cases = Strings(1000 + number), []
        strings = (source.make() for _ in range(args.cases // (3 if "seams" in name else 1)))
        strings = [s for s in strings if len(s) <= (60 if "seams" in name else 120)] + list(recent_characters())
        total += len(strings)
        for text in strings:
            ids, special, decoded, skipped = expected(tokenizer, text)
            # null: the same as the entry before it that it is likely to repeat
            cases.append([text, ids, special if special != ids else None, decoded if decoded != text else None,
                          skipped if skipped != decoded else None])
        ids = [[list_, tokenizer.decode(list_, skip_special_tokens=False)]
               for list_ in random_ids(number, tokenizer.get_vocab_size(), args.cases // 4)]
        with open(os.path.join(DATA, name + ".cases.json"), "w", encoding="utf-8") as out:
            json.dump({"encode": cases, "decode": ids}, out, ensure_ascii=False, separators=(",", ":"))
    size = sum(os.path.getsize(os.path.join(DATA, f)) for f in os.listdir(DATA))
    print(f"{len(FAMILIES)} tokenizers, {total} strings, {size} bytes in {os.path.normpath(DATA)}")


class Answers:
    def __init__(self, data):
        self.data, self.at = data, 0

    def number(self):
        self.at += 4
        return struct.unpack_from("<I", self.data, self.at - 4)[0]

    def ids(self):
        count = self.number()
        self.at += 4 * count
        return list(struct.unpack_from(f"<{count}I", self.data, self.at - 4 * count))

    def text(self):
        length = self.number()
        self.at += length
        return self.data[self.at - length:self.at].decode("utf-8")


def ask(binary, tokenizer_file, mode, questions):
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, name) for name in ("questions", "answers")]
        with open(paths[0], "wb") as out:
            out.writelines(questions)
        subprocess.run([binary, tokenizer_file, mode, *paths], check=True)
        with open(paths[1], "rb") as answers:
            return Answers(answers.read())


def report(name, what, question, ours, theirs):
    print(f"{name}: {what} differs for {question!r}\n  ours   {ours!r}\n  theirs {theirs!r}", file=sys.stderr)


def compare_one(args, name, path, strings, seed):
    tokenizer = Tokenizer.from_file(path)
    encoded = [s.encode("utf-8") for s in strings]
    answers = ask(args.binary, path, "encode", (struct.pack("<I", len(s)) + s for s in encoded))
    wrong = 0
    for text in strings:
        theirs = expected(tokenizer, text)
        ours = (answers.ids(), answers.ids(), answers.text(), answers.text())
        for what, a, b in zip(("ids", "ids with special", "text", "text without special"), ours, theirs):
            if a != b:
                wrong += 1
                if wrong <= args.show:
                    report(name, what, text, a, b)
    lists = list(random_ids(seed, tokenizer.get_vocab_size(), len(strings) // 4))
    answers = ask(args.binary, path, "decode", (struct.pack(f"<{len(ids) + 1}I", len(ids), *ids) for ids in lists))
    for ids in lists:
        for skip in (False, True):
            ours, theirs = answers.text(), tokenizer.decode(ids, skip_special_tokens=skip)
            if ours != theirs:
                wrong += 1
                if wrong <= args.show:
                    report(name, f"text (skip_special {skip})", ids, ours, theirs)
    print(f"{name}: {len(strings)} strings, {len(lists)} lists of ids, {wrong} differences", flush=True)
    return wrong


def compare(args):
    paths = {name: os.path.join(DATA, name + ".json") for name in FAMILIES}
    for path in args.also:
        paths[os.path.basename(os.path.dirname(os.path.abspath(path)))] = path
    share, total, wrong = -(-args.cases // len(paths)), 0, 0
    for number, (name, path) in enumerate(paths.items()):
        source = Strings(args.seed + number)
        strings = [source.make() for _ in range(share)]
        if args.every_character:
            strings += list(every_character())
        total += len(strings)
        wrong += compare_one(args, name, path, strings, args.seed + number)
    print(f"{total} strings, {wrong} differences")
    return 1 if wrong else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    building = commands.add_parser("build")
    building.add_argument("--cases", type=int, default=135, help="strings per tokenizer")
    comparing = commands.add_parser("compare")
    comparing.add_argument("--binary", required=True, help="the tokenizer_compare program")
    comparing.add_argument("--also", action="append", default=[], help="one more tokenizer.json")
    comparing.add_argument("--cases", type=int, default=100_000, help="strings in all")
    comparing.add_argument("--seed", type=int, default=1)
    comparing.add_argument("--show", type=int, default=5, help="differences shown per tokenizer")
    comparing.add_argument("--every-character", action="store_true", help="every code point as well")
    args = parser.parse_args()
    sys.exit(build(args) if args.command == "build" else compare(args))


if __name__ == "__main__":
    main()
