#!/usr/bin/env python3
"""Writes the bundled long documents of examples/: records, then a request whose answers must copy exact values out of them.

    python3 tools/make_examples.py [folder, default: examples beside tools]

The same script gives the same bytes everywhere: all chance comes from one fixed seed.
"""

import json
import pathlib
import random
import sys

from eval_texts import CITIES, STATES, SYLLABLES, TOOLS

# name: (seed, records, tool, calls); the numbers of records put the documents a little above 8,000 and 16,000 tokens
EXAMPLES = {
    "tool-calls-8k.txt": (8, 178, "refund_order", 12),
    "tool-calls-16k.txt": (16, 354, "update_record", 12),
}


def name(chance):
    return "".join(chance.choice(SYLLABLES) for _ in range(chance.randint(2, 3))).capitalize()


def record(chance, order_id):
    first, last = name(chance), name(chance)
    return {
        "order_id": str(order_id),
        "customer": f"{first} {last}",
        "email": f"{first.lower()}.{last.lower()}@{name(chance).lower()}.example",
        "city": chance.choice(CITIES),
        "amount": chance.randint(100, 99900) / 100,
        "status": chance.choice(STATES),
        "code": f"{chance.getrandbits(32):08x}",
    }


def line(r):
    rest = " ".join(f"{key}={value}" for key, value in r.items() if key != "order_id")
    return f"order {r['order_id']}: {rest}"


def document(seed, count, tool, calls):
    chance = random.Random(seed)
    records = [record(chance, i) for i in chance.sample(range(10000, 100000), count)]
    asked = chance.sample(records, calls)
    tools = "\n".join(json.dumps({"name": t, "parameters": p}) for t, (p, _) in TOOLS.items())
    body = "\n".join(line(r) for r in records)
    request = f"{TOOLS[tool][1]}s {', '.join(r['order_id'] for r in asked)}."
    return f"<|system|>\nTools:\n{tools}\n<|end|>\n<|user|>\n{body}\n{request}<|end|>\n<|assistant|>\n"


def main():
    here = pathlib.Path(__file__).resolve().parent.parent
    folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else here / "examples"
    folder.mkdir(parents=True, exist_ok=True)
    for file, recipe in EXAMPLES.items():
        (folder / file).write_text(document(*recipe), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
