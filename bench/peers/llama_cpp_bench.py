#!/usr/bin/env python3
"""Prefill and decode speed of llama.cpp on the CPU, under several settings.

    llama_cpp_bench.py --gguf model-bf16.gguf --gguf model-f16.gguf --threads 2 --contexts 512,4096 --json out.json

For each combination of --gguf, --flash and --kv, and each context: prefill of the whole context from empty, then
--steps single-token steps from there, each repeated from the same state; medians are reported. Token ids are random
with a fixed seed: the time does not depend on them. No sampling is timed.
"""

import argparse
import contextlib
import itertools
import json
import random
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import llama_cpp

from llama_session import KV_TYPES, Session, Settings, loaded_model

SEED = 1
METRICS = ("prefill_tokens_per_second", "decode_tokens_per_second")


def comma_list(convert):
    return lambda text: [convert(item) for item in text.split(",")]


def one_of(choices):
    def convert(item):
        if item not in choices:
            raise argparse.ArgumentTypeError(f"{item!r} is none of {', '.join(choices)}")
        return item

    return convert


def positive(item):
    value = int(item)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def timed_repeats(repeats, min_seconds, prepare, work):
    """Seconds of each repeat of work(): at least `repeats` of them, more while they add up to less than min_seconds."""
    seconds = []
    while len(seconds) < repeats or sum(seconds) < min_seconds:
        prepare()
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return seconds


def measure(model, settings, context, args):
    """One entry of `results`."""
    source = random.Random(SEED)
    with Session(model, settings, context + args.steps, args.threads) as session:
        prompt = session.batches([source.randrange(session.vocabulary) for _ in range(context)], 0)
        steps = session.batches([source.randrange(session.vocabulary) for _ in range(args.steps)], context, 1)
        session.process(prompt[:1])  # warm
        prefill = timed_repeats(
            args.repeats, args.min_seconds, lambda: session.truncate(0), lambda: session.process(prompt)
        )
        session.process(steps)  # warm
        session.reset_inner_clock()
        decode = timed_repeats(
            args.repeats, args.min_seconds, lambda: session.truncate(context), lambda: session.process(steps)
        )
        inner = session.inner_decode_seconds()
    return {
        "settings": settings.to_json(),
        "context": context,
        "prefill_tokens_per_second": context / statistics.median(prefill),
        "prefill_seconds": prefill,
        "decode_tokens_per_second": args.steps / statistics.median(decode),
        "decode_seconds": decode,
        "decode_steps": args.steps,
        "outside_us_per_step": 1e6 * (sum(decode) - inner) / (len(decode) * args.steps),
    }


def measure_and_print(models, settings, context, args):
    result = measure(models[settings.gguf], settings, context, args)
    print(
        f"{context:6} tokens  prefill {result['prefill_tokens_per_second']:9.1f}  "
        f"decode {result['decode_tokens_per_second']:7.1f} tokens/s  "
        f"outside llama.cpp {result['outside_us_per_step']:.1f} us/step  {settings}",
        file=sys.stderr,
        flush=True,
    )
    return result


def worth_keeping(results, limit):
    """The settings that were, in prefill or in decode, at most `limit` times slower than the fastest."""
    kept = []
    for result in results:
        if any(result[metric] * limit >= max(other[metric] for other in results) for metric in METRICS):
            kept.append(Settings(**result["settings"]))
    return kept


def measure_all(models, args):
    """Every combination at every context, shortest first, less those that a shorter context has ruled out."""
    combinations = itertools.product(args.gguf, args.flash, args.kv)
    alive = [Settings(gguf=path, flash=flash == "on", kv=kv, ubatch=args.ubatch[0]) for path, flash, kv in combinations]
    results = []
    for context in sorted(args.contexts):
        here = [measure_and_print(models, settings, context, args) for settings in alive]
        alive = worth_keeping(here, args.prune)
        fastest = Settings(**best_of(here, "prefill_tokens_per_second")[context]["settings"])
        results += here
        for ubatch in args.ubatch[1:]:
            results.append(measure_and_print(models, replace(fastest, ubatch=ubatch), context, args))
    return results


def best_of(results, metric):
    """context -> the result with the highest metric."""
    best = {}
    for result in results:
        context = result["context"]
        if context not in best or result[metric] > best[context][metric]:
            best[context] = result
    return best


def print_best(results):
    for metric in METRICS:
        for context, result in sorted(best_of(results, metric).items()):
            print(
                f"best {metric.split('_')[0]:8}{context:6} tokens  {result[metric]:10.1f} tokens/s  "
                f"{Settings(**result['settings'])}"
            )


def parse_arguments():
    parser = argparse.ArgumentParser(description="Measure llama.cpp's prefill and decode on the CPU.")
    parser.add_argument("--gguf", action="append", required=True, help="model file; repeatable")
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--contexts", type=comma_list(positive), default=[512, 4096, 16384])
    parser.add_argument("--flash", type=comma_list(one_of(("on", "off"))), default=["on", "off"])
    parser.add_argument("--kv", type=comma_list(one_of(tuple(KV_TYPES))), default=["f16", "bf16"])
    parser.add_argument(
        "--ubatch",
        type=comma_list(positive),
        default=[512],
        help="the first is used everywhere, the others with each context's fastest prefill",
    )
    parser.add_argument(
        "--prune",
        type=float,
        default=1.5,
        metavar="FACTOR",
        help="drop a combination from longer contexts when both its prefill and its decode are slower "
        "than the best by more than this (default: 1.5)",
    )
    parser.add_argument("--steps", type=positive, default=64, help="tokens of one decode repeat (default: 64)")
    parser.add_argument("--repeats", type=positive, default=3, help="fewest repeats of each measurement (default: 3)")
    parser.add_argument("--min-seconds", type=float, default=1.0, help="fewest seconds of each (default: 1)")
    parser.add_argument("--json", type=Path, help="write everything here")
    return parser.parse_args()


def main():
    args = parse_arguments()
    for path in args.gguf:
        if not Path(path).is_file():
            sys.exit(f"llama_cpp_bench: {path} does not exist; make it with convert_to_gguf.py")
    with contextlib.ExitStack() as stack:
        models = {path: stack.enter_context(loaded_model(path)) for path in args.gguf}
        results = measure_all(models, args)
    print_best(results)
    if args.json:
        report = {
            "engine": "llama.cpp",
            "binding": f"llama-cpp-python {llama_cpp.__version__}",
            "system": llama_cpp.llama_print_system_info().decode(),
            "threads": args.threads,
            "results": results,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:
        sys.exit(f"llama_cpp_bench: {error}")
