#!/usr/bin/env python3
"""Holds a GGUF conversion against the golden files of the model it was made from.

    check_gguf.py build/models/vericode-26m vericode-26m-bf16.gguf

The golden logits are float32; llama.cpp rounds weights, activations and KV, so they agree to a relative error (the norm
of the difference over the norm, all rows together) and in the chosen token wherever the margin is above what the error
can move. Exit 0 if both hold, 1 otherwise. Text is tokenized too, and differences are counted, not judged: the
benchmark passes token ids.
"""

import argparse
import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np
from safetensors.numpy import load_file

from llama_session import KV_TYPES, Session, Settings, loaded_model

MAX_RELATIVE_ERROR = 0.02


class Comparison:
    """What the prompts have shown so far."""

    def __init__(self):
        self.squared_error = 0.0
        self.squared_norm = 0.0
        self.largest_difference = 0.0
        self.rows = 0
        self.choices = []  # (where, token chosen, golden token, margin)

    def add_row(self, logits, golden):
        difference = logits - golden
        self.squared_error += float(difference @ difference)
        self.squared_norm += float(golden @ golden)
        self.largest_difference = max(self.largest_difference, float(np.abs(difference).max()))
        self.rows += 1

    def relative_error(self):
        return (self.squared_error / self.squared_norm) ** 0.5

    def decided(self):
        """The choices that the seen error cannot excuse: two logits would have to move by the margin together."""
        return [choice for choice in self.choices if choice[3] > 2 * self.largest_difference]

    def wrong(self):
        return [choice for choice in self.decided() if choice[1] != choice[2]]


def compare_prompt(session, entry, step_logits, comparison):
    """Feeds the prompt, then the golden tokens one by one; the first step's logits are those after the prompt."""
    session.truncate(0)
    prompt = entry["prompt_ids"]
    feeds = [session.batches(prompt, 0)]
    feeds += [[step] for step in session.batches(entry["greedy_ids"][:-1], len(prompt), 1)]
    for step, (feed, token, margin) in enumerate(zip(feeds, entry["greedy_ids"], entry["margins"])):
        session.process(feed)
        logits = session.last_logits()
        if step < len(step_logits):
            comparison.add_row(logits, step_logits[step])
        comparison.choices.append((f"{entry['name']} step {step}", int(logits.argmax()), token, margin))


def tokenizer_differences(model, path):
    """(differences, cases) of llama.cpp's tokenizer against the model's cases."""
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    differences = 0
    cases = json.loads(path.read_text(encoding="utf-8"))
    for case in cases:
        text = case["text"].encode()
        ids = (llama_cpp.llama_token * (len(text) + 8))()
        count = llama_cpp.llama_tokenize(vocabulary, text, len(text), ids, len(ids), False, True)
        differences += list(ids[: max(count, 0)]) != case["ids"]
    return differences, len(cases)


def main():
    parser = argparse.ArgumentParser(description="Check a GGUF conversion against the model's golden files.")
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kv", choices=sorted(KV_TYPES), default="f16")
    parser.add_argument("--flash", choices=("on", "off"), default="off")
    args = parser.parse_args()

    golden = args.model_dir / "golden"
    entries = json.loads((golden / "golden.json").read_text(encoding="utf-8"))
    tensors = load_file(golden / "golden.safetensors")
    settings = Settings(gguf=str(args.gguf), flash=args.flash == "on", kv=args.kv, ubatch=512)
    capacity = max(len(entry["prompt_ids"]) + len(entry["greedy_ids"]) for entry in entries)
    total = Comparison()
    with loaded_model(args.gguf) as model, Session(model, settings, capacity, args.threads) as session:
        for entry in entries:
            compare_prompt(session, entry, tensors[f"{entry['name']}.step_logits"], total)
            print(
                f"{entry['name']}: {len(entry['prompt_ids'])} prompt tokens done, relative error so far "
                f"{total.relative_error():.5f}"
            )
        cases = golden / "tokenizer_cases.json"
        if cases.exists():
            differences, texts = tokenizer_differences(model, cases)
            print(f"tokenizer: {differences} of {texts} texts differ")

    wrong = total.wrong()
    print(
        f"{total.rows} rows of logits: relative error {total.relative_error():.5f}, largest difference "
        f"{total.largest_difference:.3f}; {len(total.decided())} of {len(total.choices)} choices have a larger "
        f"margin, {len(wrong)} of those differ"
    )
    for where, chosen, expected, margin in wrong:
        print(f"{where}: token {chosen}, golden {expected}, margin {margin}", file=sys.stderr)
    sys.exit(0 if total.relative_error() <= MAX_RELATIVE_ERROR and not wrong else 1)


if __name__ == "__main__":
    main()
