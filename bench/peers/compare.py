#!/usr/bin/env python3
"""VeriCache with the full cache against llama.cpp, in turns on the same machine: prefill and decode speed as ratios.

    compare.py --vericache build/vericache --model build/models/vericode-26m --threads 2

Converts the model to GGUF (bf16 and f16) and checks the conversion, lets llama.cpp run under every setting to find its
fastest for each context, then measures both engines alternately for several rounds. A ratio above 1 means that
VeriCache is faster. Run it with the interpreter that has requirements.txt installed.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
METRICS = {"prefill": "prefill_tokens_per_second", "decode": "decode_tokens_per_second"}
ATTEMPTS = 3  # at one measurement, while other programs disturb it


class Failed(Exception):
    """A program that the comparison needs did not do its part."""


def parse_vericache(text):
    """{metric: tokens/s} of the one full-cache result in what `vericache bench --json` prints."""
    results = [entry for entry in json.loads(text)["results"] if entry["mode"] == "full"]
    if len(results) != 1:
        raise Failed(f"vericache bench gave {len(results)} full-cache results for one context")
    return {metric: float(results[0][key]) for metric, key in METRICS.items()}


def other_cpu_seconds():
    """CPU seconds of everything on the machine but this process's finished children, stolen time included."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    own = resource.getrusage(resource.RUSAGE_CHILDREN)
    ticks = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq + steal) / ticks - own.ru_utime - own.ru_stime


def run(command):
    """(stdout, CPUs that others used meanwhile)."""
    busy, begin = other_cpu_seconds(), time.monotonic()
    try:
        done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True, check=False)
    except OSError as error:
        raise Failed(f"cannot run {command[0]}: {error.strerror}") from error
    if done.returncode != 0:
        raise Failed(f"exit {done.returncode} from: {' '.join(str(part) for part in command)}")
    others = (other_cpu_seconds() - busy) / (time.monotonic() - begin)
    return done.stdout, max(0.0, round(others, 3))


def say(text):
    print(text, file=sys.stderr, flush=True)


def converted(model_dir, work_dir):
    """Paths of the bf16 and f16 conversions, made and checked where they are missing or older than the model."""
    newest = max(path.stat().st_mtime for path in model_dir.iterdir())
    paths = []
    for weight_type in ("bf16", "f16"):
        path = work_dir / f"{model_dir.name}-{weight_type}.gguf"
        paths.append(path)
        if path.exists() and path.stat().st_mtime >= newest:
            continue
        say(f"converting {model_dir.name} to {path.name}")
        fresh = path.with_suffix(".unchecked")
        run([sys.executable, HERE / "convert_to_gguf.py", model_dir, fresh, "--type", weight_type])
        if (model_dir / "golden").is_dir():
            say(run([sys.executable, HERE / "check_gguf.py", model_dir, fresh])[0].splitlines()[-1])
        else:
            say(f"{model_dir.name} has no golden files: the conversion is not checked")
        fresh.replace(path)
    return paths


def llama_cpp(args, work_dir, contexts, extra):
    """(`results` and system of one run of llama_cpp_bench.py, CPUs that others used)."""
    with tempfile.NamedTemporaryFile(dir=work_dir, suffix=".json") as out:
        _, others = run(
            [
                sys.executable,
                HERE / "llama_cpp_bench.py",
                "--threads",
                args.threads,
                "--contexts",
                ",".join(map(str, contexts)),
                "--steps",
                args.steps,
                "--json",
                out.name,
                *extra,
            ]
        )
        return json.loads(Path(out.name).read_text(encoding="utf-8")), others


def fastest_settings(report):
    """{(context, metric): settings}; llama.cpp may use different ones for prefill and for decode."""
    best = {}
    for result in report["results"]:
        for metric, key in METRICS.items():
            place = (result["context"], metric)
            if place not in best or result[key] > best[place][key]:
                best[place] = result
    return {place: result["settings"] for place, result in best.items()}


def describe(settings):
    flash = "on" if settings["flash"] else "off"
    return f"{Path(settings['gguf']).stem} flash={flash} kv={settings['kv']} ubatch={settings['ubatch']}"


def measure_vericache(args, context):
    text, others = run(
        [
            args.vericache,
            "bench",
            "--model",
            args.model,
            "--contexts",
            context,
            "--mode",
            "full",
            "--steps",
            args.steps,
            "--threads",
            args.threads,
            "--json",
        ]
    )
    return {"engine": "vericache", "context": context, "others_cpus": others, **parse_vericache(text)}


def measure_llama_cpp(args, work_dir, context, settings):
    """Prefill under its fastest settings, decode under its own; one process where they are the same."""
    sample = {"engine": "llama.cpp", "context": context, "others_cpus": 0.0}
    kept = {}
    for metric, key in METRICS.items():
        chosen = settings[context, metric]
        name = describe(chosen)
        if name not in kept:
            extra = [
                "--gguf",
                chosen["gguf"],
                "--flash",
                "on" if chosen["flash"] else "off",
                "--kv",
                chosen["kv"],
                "--ubatch",
                chosen["ubatch"],
                "--repeats",
                args.repeats,
            ]
            report, others = llama_cpp(args, work_dir, [context], extra)
            kept[name] = report["results"][0]
            sample["others_cpus"] = max(sample["others_cpus"], others)
        sample[metric] = kept[name][key]
    return sample


def undisturbed(args, measure):
    """The first sample during which others left the CPUs alone; after ATTEMPTS the last one, disturbed as it is."""
    for attempt in range(ATTEMPTS):
        sample = measure()
        if sample["others_cpus"] <= args.others_limit:
            break
        say(
            f"{sample['engine']} at {sample['context']} tokens: others used {sample['others_cpus']} CPUs, "
            f"{'measuring again' if attempt + 1 < ATTEMPTS else 'kept all the same'}"
        )
    return sample


def measure_in_turns(args, work_dir, settings):
    """All samples. Who goes first alternates, so that a drift of the machine favours neither."""
    samples = []
    for number in range(args.rounds):
        for context in args.contexts:
            pair = [
                lambda: measure_vericache(args, context),
                lambda: measure_llama_cpp(args, work_dir, context, settings),
            ]
            for measure in pair if number % 2 == 0 else reversed(pair):
                sample = {"round": number, **undisturbed(args, measure)}
                samples.append(sample)
                say(
                    f"round {number + 1}/{args.rounds} {context:6} tokens {sample['engine']:10} "
                    f"prefill {sample['prefill']:9.1f} decode {sample['decode']:7.1f} tokens/s"
                )
    return samples


def spread(values):
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def summarize(samples, settings):
    """One row for each context and metric; the ratio of a round is taken from that round's own pair."""
    rows = []
    for context in sorted({sample["context"] for sample in samples}):
        for metric in METRICS:
            ours, theirs = (
                [
                    sample[metric]
                    for sample in sorted(samples, key=lambda s: s["round"])
                    if sample["context"] == context and sample["engine"] == engine
                ]
                for engine in ("vericache", "llama.cpp")
            )
            rows.append(
                {
                    "context": context,
                    "metric": metric,
                    "vericache": spread(ours),
                    "llama_cpp": spread(theirs),
                    "ratio": spread([a / b for a, b in zip(ours, theirs)]),
                    "llama_cpp_settings": settings[context, metric],
                }
            )
    return rows


def cell(values, digits):
    return f"{values['median']:.{digits}f} [{values['lowest']:.{digits}f}, {values['highest']:.{digits}f}]"


def print_table(rows):
    print("| context | | VeriCache, tokens/s | llama.cpp, tokens/s | ratio | llama.cpp's fastest settings |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['context']} | {row['metric']} | {cell(row['vericache'], 1)} | {cell(row['llama_cpp'], 1)} "
            f"| {cell(row['ratio'], 2)} | {describe(row['llama_cpp_settings'])} |"
        )
    print("\nMedian [lowest, highest] over the rounds; a ratio above 1 means that VeriCache is faster.")


def print_disturbed(args, samples):
    disturbed = sum(sample["others_cpus"] > args.others_limit for sample in samples)
    if disturbed:
        print(f"{disturbed} of {len(samples)} measurements were disturbed by other programs: not a fair run.")


def parse_arguments():
    parser = argparse.ArgumentParser(description="Compare VeriCache's full-cache speed with llama.cpp's.")
    parser.add_argument("--vericache", type=Path, required=True, help="the binary")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument(
        "--contexts", type=lambda text: [int(item) for item in text.split(",")], default=[512, 4096, 16384]
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="for both (default: all CPUs)")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of measurements for each context (default: 3)")
    parser.add_argument(
        "--repeats",
        type=int,
        default=1,
        help="llama.cpp: fewest repeats in a round; short ones are repeated for a second (default: 1)",
    )
    parser.add_argument(
        "--others-limit",
        type=float,
        default=0.1,
        metavar="CPUS",
        help="measure again when other programs used more than this meanwhile (default: 0.1)",
    )
    parser.add_argument("--steps", type=int, default=64, help="decoded tokens of one repeat (default: 64)")
    parser.add_argument("--work-dir", type=Path, default=Path("build/peers"), help="GGUF files (default: build/peers)")
    parser.add_argument(
        "--tuning",
        type=Path,
        metavar="FILE",
        help="reuse llama.cpp's settings from this earlier --json report instead of searching again",
    )
    parser.add_argument("--json", type=Path, help="write everything here")
    args = parser.parse_args()
    if min(args.rounds, args.repeats, args.steps, args.threads, *args.contexts) < 1:
        parser.error("contexts, rounds, repeats, steps and threads must be 1 or more")
    return args


def tuned(args, ggufs):
    """llama.cpp's report over all settings, measured now or taken from an earlier comparison."""
    if args.tuning:
        report = json.loads(args.tuning.read_text(encoding="utf-8"))["llama_cpp_tuning"]
        missing = set(args.contexts) - {result["context"] for result in report["results"]}
        if missing or report["threads"] != args.threads:
            raise Failed(f"{args.tuning} was made for other contexts or threads; leave --tuning out")
        if {result["settings"]["gguf"] for result in report["results"]} - {str(path) for path in ggufs}:
            raise Failed(f"{args.tuning} was made for another model or --work-dir; leave --tuning out")
        return report
    say("searching for llama.cpp's fastest settings")
    extra = ["--repeats", args.repeats, "--ubatch", "512,128,2048"]
    for path in ggufs:
        extra += ["--gguf", path]
    report, others = llama_cpp(args, args.work_dir, args.contexts, extra)
    if others > args.others_limit:
        say(f"others used {others} CPUs during the search: its choice may be wrong")
    return report


def main():
    args = parse_arguments()
    if not args.vericache.is_file() or not (args.model / "config.json").is_file():
        raise Failed(f"need the binary {args.vericache} and {args.model / 'config.json'}; `make build` makes both")
    args.vericache = args.vericache.resolve()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    report = tuned(args, converted(args.model, args.work_dir))
    settings = fastest_settings(report)
    samples = measure_in_turns(args, args.work_dir, settings)
    rows = summarize(samples, settings)
    print_table(rows)
    print_disturbed(args, samples)
    if args.json:
        whole = {
            "model": args.model.name,
            "threads": args.threads,
            "steps": args.steps,
            "rows": rows,
            "samples": samples,
            "llama_cpp_tuning": report,
        }
        args.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except (Failed, ValueError, KeyError) as error:
        sys.exit(f"compare: {error!r}" if isinstance(error, KeyError) else f"compare: {error}")
