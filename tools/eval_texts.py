"""The prompts that `vericache eval` measures calls, export and code on, drawn again in Python.

Imported by acceptance_reference.py; the formats and the order of the draws are those of src/text/record_rows.cc, src/text/records.cc
and apps/source_tree.cc. `encode` turns a text into a list of token ids.
"""

import json
import sys

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
