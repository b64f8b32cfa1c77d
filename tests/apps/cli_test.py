#!/usr/bin/env python3
"""The command line as a person and a script meet it: exit codes, one clear line for bad input, JSON, streams and signals.

    cli_test.py BINARY MODELS [unittest options]      MODELS holds vericode-5m
"""

import json
import os
import pathlib
import re
import signal
import struct
import subprocess
import sys
import tempfile
import unittest
import xml.etree.ElementTree

BINARY = ""
MODEL = ""
DOCUMENT = pathlib.Path(__file__).resolve().parents[2] / "examples" / "tool-calls-8k.txt"
COMMANDS = ["generate", "check", "bench", "eval", "logits", "inspect"]
FUNCTION = "def fibonacci(n):\n"


def environment(extra=None):
    """The caller's, without its VERICACHE_ variables: they would change what the tests ask for."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("VERICACHE_")}
    return {**kept, **(extra or {})}


def run(*args, stdin=b"", env=None, timeout=120):
    return subprocess.run([BINARY, *map(str, args)], input=stdin, capture_output=True, env=environment(env), timeout=timeout)


def generate(*args, prompt=FUNCTION, **kwargs):
    """The JSON object of a short generation."""
    done = run("generate", "--model", MODEL, "--prompt", prompt, "--json", *args, **kwargs)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


class Folder(unittest.TestCase):
    """Each test has a folder of its own."""

    def setUp(self):
        holder = tempfile.TemporaryDirectory()
        self.addCleanup(holder.cleanup)
        self.folder = pathlib.Path(holder.name)

    def file(self, name, content):
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path


class Help(unittest.TestCase):
    def test_every_command_explains_itself_with_examples(self):
        overview = run("--help")
        self.assertEqual(overview.returncode, 0)
        for command in COMMANDS:
            self.assertIn(command, overview.stdout.decode())
            done = run(command, "--help")
            text = done.stdout.decode()
            self.assertEqual((done.returncode, done.stderr), (0, b""), command)
            self.assertIn("Examples:\n  vericache " + command, text)
            self.assertIn("VERICACHE_MODEL", text)
            self.assertNotIn("inject", text)

    def test_version(self):
        done = run("--version")
        self.assertEqual(done.returncode, 0)
        self.assertRegex(done.stdout.decode(), r"^\d+\.\d+\.\d+\n$")


class BadInput(Folder):
    def refused(self, code, message, *args, stdin=b"", env=None):
        with self.subTest(args=args):
            done = run(*args, stdin=stdin, env=env)
            error = done.stderr.decode(errors="replace")
            self.assertEqual(done.returncode, code, error)
            self.assertRegex(error, message)
            self.assertEqual(error.count("\n"), 1, "one line: " + error)
            self.assertTrue(error.startswith("vericache: "), error)
            self.assertEqual(done.stdout, b"")

    def refused_prompt(self, code, message, *args, **kwargs):
        self.refused(code, message, "generate", "--model", MODEL, "--prompt", "x", *args, **kwargs)

    def test_usage(self):
        self.refused(2, "command is missing: generate, check")
        self.refused(2, r"unknown command 'generat' \(did you mean generate\?\)", "generat")
        self.refused(2, "unknown flag --foo", "--foo")
        self.refused(2, "--model is required", "generate")
        self.refused_prompt(2, r"unknown flag --max-token \(did you mean --max-tokens\?\)", "--max-token", 3)
        self.refused_prompt(2, "unexpected argument 'y'", "y")
        self.refused_prompt(2, "--prompt excludes --prompt-file", "--prompt-file", DOCUMENT)
        self.refused(2, "either --ids-file or --prompt-file", "logits", "--model", MODEL)

    def test_values(self):
        self.refused_prompt(2, "unknown method 'zip'.*kivi.*snapkv", "--compressor", "zip")
        self.refused_prompt(2, "bits must be one of 2, 3, 4, 6, 8", "--compressor", "kivi:bits=5")
        self.refused_prompt(2, "unknown option 'bit'", "--compressor", "kivi:bit=4")
        self.refused_prompt(2, "--horizon 'far'.*adaptive", "--horizon", "far")
        self.refused_prompt(2, "--horizon 0 .*--compressor none", "--horizon", "0")
        self.refused_prompt(2, "--device-memory '12Q' is not a size.*512Mi", "--device-memory", "12Q")
        self.refused_prompt(2, "--device-memory '-5' is not a size", "--device-memory=-5")
        self.refused_prompt(2, "out of range", "--device-memory", "99999999999999T")
        self.refused_prompt(2, "isa 'mmx' is unknown.*avx2", "--isa", "mmx")
        self.refused_prompt(2, "--max-tokens: Value 0 not in range", "--max-tokens", "0")
        self.refused_prompt(2, "--temperature", "--temperature", "-1")
        self.refused_prompt(1, "top_p is 0", "--top-p", "0")
        self.refused_prompt(1, "stop string is empty", "--stop", "")
        self.refused_prompt(2, "--max-tokens", env={"VERICACHE_MAX_TOKENS": "many"})
        self.refused(2, "lower --contexts or --steps", "bench", "--model", MODEL, "--contexts", "32768")
        self.refused(1, "one record alone takes", "check", "--model", MODEL, "--context", 3)

    def test_memory(self):
        self.refused_prompt(1, "less than the weights alone.*raise", "--device-memory", "1M")
        self.refused_prompt(1, "raise --device-memory by", "--device-memory", "12M")
        self.refused_prompt(1, "raise --host-memory", "--host-memory", "1k")

    def test_models(self):
        def refused(message, model):
            self.refused(1, message, "generate", "--model", model, "--prompt", "x")
            self.refused(1, message, "inspect", "--model", model)

        refused("is no directory.*config.json", self.folder / "nowhere")
        refused("no config.json", self.folder)
        self.file("config.json", '{"model_type": "llama", ')
        refused("config.json", self.folder)
        self.file("config.json", '{"model_type": "mamba"}')
        refused("mamba.*llama", self.folder)
        for name in ("config.json", "tokenizer.json"):
            self.file(name, (pathlib.Path(MODEL) / name).read_bytes())
        refused("safetensors", self.folder)
        self.file("model.safetensors", struct.pack("<Q", 2**63) + b"{}")
        refused("safetensors", self.folder)

    def test_prompts(self):
        def refused(message, *args, stdin=b""):
            self.refused(1, message, "generate", "--model", MODEL, *args, stdin=stdin)

        refused("--prompt is empty", "--prompt", "")
        refused("stdin is empty")
        refused("empty.txt is empty", "--prompt-file", self.file("empty.txt", ""))
        refused("cannot be opened: No such file", "--prompt-file", self.folder / "nowhere")
        refused("cannot be read: Is a directory", "--prompt-file", self.folder)
        refused(r"latin.txt is not UTF-8: byte 2 \(0xe9\).*iconv", "--prompt-file", self.file("latin.txt", b"th\xe9"))
        refused(r"stdin is not UTF-8: byte 0", stdin=b"\xff")
        refused(r"--prompt is not UTF-8: byte 1", "--prompt", b"a\xc3".decode("utf-8", "surrogateescape"))
        refused("context holds 4096.*shorten it by", "--prompt-file", DOCUMENT, "--max-model-len", 4096)
        refused("context holds 32768.*shorten it by", stdin=b"word " * 40000)
        self.refused(2, "more than the context of the model", "generate", "--model", MODEL, "--prompt", "x", "--max-model-len", 32769)

    def test_lists_of_ids_and_prompts(self):
        def refused(message, command, flag, content):
            self.refused(1, message, command, "--model", MODEL, flag, self.file("input", content))

        refused("at least one token id", "logits", "--ids-file", "[]")
        refused("at least one token id", "logits", "--ids-file", '{"ids": [1]}')
        refused("entry 1 is no token id of this model.*8191", "logits", "--ids-file", "[5, 8192]")
        refused("entry 0 is no token id", "logits", "--ids-file", "[-1]")
        refused("entry 0 is no token id", "logits", "--ids-file", "[1.5]")
        refused("entry 0 is no token id", "logits", "--ids-file", "[99999999999999999999]")
        refused("input", "logits", "--ids-file", "[1,")
        refused("line 2", "check", "--prompts", '{"prompt": "x"}\n{"text": "x"}\n')
        refused("line 1.*no token id", "check", "--prompts", '{"ids": [8192]}')
        refused("holds no prompts", "check", "--prompts", "\n\n")


class Generate(Folder):
    def test_json_and_stream_agree(self):
        told = generate("--max-tokens", 24, "--compare-full")
        self.assertEqual(len(told["tokens"]), 24)
        self.assertEqual(told["finish_reason"], "length")
        self.assertEqual(told["compare_full"]["identical"], True)
        self.assertEqual(told["compare_full"]["hash"], told["hash"])
        self.assertEqual(told["compare_full"]["tokens"], 24)
        self.assertGreater(told["speculation"]["rounds"], 0)
        for name in ("weight_bytes", "tail_pool_bytes", "resident_pool_bytes", "host_pool_bytes", "activation_bytes"):
            self.assertGreater(told["memory"][name], 0, name)
        self.assertGreater(told["peak_memory_bytes"], told["memory"]["weight_bytes"])

        streamed = run("generate", "--model", MODEL, "--max-tokens", 24, "--compare-full", stdin=FUNCTION.encode())
        self.assertEqual(streamed.returncode, 0)
        self.assertEqual(streamed.stdout.decode(), told["text"])
        summary = streamed.stderr.decode()
        for word in ("tokens/s", "accepted", "resident", "residual", "wire", "peak", "identical"):
            self.assertIn(word, summary)
        self.assertNotIn("\x1b", summary, "no progress where stderr is no terminal")

    def test_seed_decides(self):
        warm = ["--max-tokens", 24, "--temperature", 1, "--ignore-eos"]
        first = generate(*warm, "--seed", 1)
        self.assertEqual(first["hash"], generate(*warm, "--seed", 1)["hash"])
        self.assertNotEqual(first["tokens"], generate(*warm, "--seed", 2)["tokens"])
        # Neither how the work is cut nor what is kept on the device shows in a single bit.
        other = ["--prefill-chunk", 150, "--threads", 1, "--compressor", "snapkv+kivi:bits=2", "--horizon", 7]
        self.assertEqual(first["hash"], generate(*warm, "--seed", 1, *other)["hash"])
        self.assertEqual(first["hash"], generate(*warm, "--seed", 1, "--compressor", "none")["hash"])

    def test_stop_string_ends_the_text_before_it(self):
        whole = generate("--max-tokens", 40, "--ignore-eos")
        stop = whole["text"][10:14]
        cut = generate("--max-tokens", 40, "--ignore-eos", "--stop", "never to be found", "--stop", stop, "--compare-full")
        self.assertEqual(cut["finish_reason"], "stop")
        self.assertEqual(cut["text"], whole["text"][: whole["text"].index(stop)])
        self.assertLess(len(cut["tokens"]), 40)
        self.assertEqual(cut["tokens"], whole["tokens"][: len(cut["tokens"])])
        self.assertTrue(cut["compare_full"]["identical"])

    def test_end_token_ends_it_unless_ignored(self):
        prompt = DOCUMENT.read_text()[-1500:]
        prompt = "<|system|>\n<|end|>\n<|user|>\n" + prompt[prompt.index("order ") :]
        prompt = prompt[: prompt.index("Refund")] + "What is the city of order 59949?<|end|>\n<|assistant|>\n"
        on = generate("--max-tokens", 100, "--ignore-eos", prompt=prompt)
        self.assertEqual((on["finish_reason"], len(on["tokens"])), ("length", 100))
        self.assertIn("<|end|>", on["text"])
        ended = generate("--max-tokens", 100, prompt=prompt)
        self.assertEqual(ended["finish_reason"], "stop")
        self.assertEqual(ended["text"], on["text"][: on["text"].index("<|end|>")])
        self.assertEqual(on["tokens"][: len(ended["tokens"])], ended["tokens"])

    def test_context_ends_it(self):
        told = generate("--max-tokens", 500, "--ignore-eos", "--max-model-len", 64)
        self.assertEqual(told["finish_reason"], "length")
        self.assertEqual(told["prompt_tokens"] + len(told["tokens"]), 64)

    def test_command_line_beats_environment_beats_default(self):
        env = {"VERICACHE_MAX_TOKENS": "5", "VERICACHE_IGNORE_EOS": "true", "VERICACHE_MODEL": MODEL}
        done = run("generate", "--prompt", FUNCTION, "--json", env=env)
        self.assertEqual(done.returncode, 0, done.stderr.decode())
        self.assertEqual(len(json.loads(done.stdout)["tokens"]), 5)
        self.assertEqual(len(generate("--max-tokens", 7, env=env)["tokens"]), 7)

    def test_full_cache_streamed_over_the_wire(self):
        prompt = DOCUMENT.read_text()[:6000]
        told = generate("--max-tokens", 12, "--ignore-eos", "--compare-full", "--prefill-chunk", 129, "--horizon", 16, "--ring-layers", 1,
                        "--device-memory", "18M", "--wire-gbps", 2, prompt=prompt)
        self.assertTrue(told["compare_full"]["identical"])
        full = told["compare_full"]
        self.assertFalse(full["full_on_device"])
        self.assertGreater(full["wire_bytes_per_token"], 2 * told["wire_bytes_per_token"])
        self.assertGreater(told["wire_bytes_per_token"], 0)
        roomy = generate("--max-tokens", 12, "--ignore-eos", prompt=prompt)
        self.assertEqual(roomy["hash"], told["hash"])
        self.assertTrue(generate("--max-tokens", 12, "--compare-full", prompt=prompt)["compare_full"]["full_on_device"])

    def test_nothing_is_decided_after_the_last_token(self):
        # The pages of the prompt are still on the slow wire when the second token ends the sequence.
        told = generate("--max-tokens", 2, "--ignore-eos", "--horizon", 1, "--wire-gbps", 0.001, prompt=DOCUMENT.read_text()[:420])
        self.assertEqual((told["finish_reason"], len(told["tokens"])), ("length", 2))

    def test_interrupt_ends_with_a_summary(self):
        command = [BINARY, "generate", "--model", MODEL, "--prompt", FUNCTION, "--ignore-eos", "--max-tokens", "30000", "--inject-delay-us",
                   "200"]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
        self.addCleanup(child.kill)
        self.assertNotEqual(os.read(child.stdout.fileno(), 1), b"")
        child.send_signal(signal.SIGINT)
        _, error = child.communicate(timeout=60)
        self.assertEqual(child.returncode, 130)
        self.assertIn("ended by: interrupted", error.decode())

    def test_closed_stdout_ends_quietly(self):
        command = [BINARY, "generate", "--model", MODEL, "--prompt", FUNCTION, "--ignore-eos", "--max-tokens", "30000"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as child:
            self.addCleanup(child.kill)
            os.read(child.stdout.fileno(), 1)
            child.stdout.close()
            error = child.stderr.read()
            self.assertEqual(child.wait(timeout=60), -signal.SIGPIPE)
            self.assertEqual(error, b"")

    @unittest.skipUnless(os.path.exists("/dev/full"), "no /dev/full here")
    def test_full_disk_is_told(self):
        with open("/dev/full", "wb") as full:
            done = subprocess.run([BINARY, "inspect", "--model", MODEL, "--json"], stdout=full, stderr=subprocess.PIPE, env=environment())
        self.assertEqual(done.returncode, 1)
        self.assertIn("stdout cannot be written", done.stderr.decode())


class Check(Folder):
    def check(self, *args):
        done = run("check", "--model", MODEL, "--json", *args)
        self.assertEqual(done.returncode, 0, done.stderr.decode())
        report = json.loads(done.stdout)
        self.assertTrue(report["identical"])
        self.assertEqual(report["mismatches"], 0)
        self.assertIsNone(report["first_mismatch"])
        self.assertEqual(report["tokens"], sum(cell["tokens"] for cell in report["cells"]))
        return report

    def test_small_matrix(self):
        report = self.check("--compressor", "none", "--compressor", "streaming-llm:sinks=4,window=128", "--compressor", "kivi:bits=2",
                            "--compressor", "snapkv:budget=0.3+kivi:bits=4", "--horizon", 3, "--horizon", "adaptive", "--temperature", 0,
                            "--temperature", 0.8, "--context", 250, "--context", 700, "--documents", 3, "--max-tokens", 20,
                            "--max-sequences", 2)
        self.assertEqual(len(report["cells"]), 4 * 2 * 2 * 2)
        self.assertEqual(report["tokens"], 32 * 3 * 20)
        for cell in report["cells"]:
            self.assertEqual(cell["tokens"], 60)
            self.assertGreater(cell["rounds"], 0)
            self.assertGreaterEqual(cell["accepted_per_round"], 0)
        self.assertGreater(report["accepted_per_round"], 0.5)

    def test_given_prompts(self):
        lines = self.file("prompts.jsonl", json.dumps({"prompt": FUNCTION}) + "\n\n" + json.dumps({"ids": [1, 2, 3]}) + "\n")
        text = self.file("prompt.txt", "package main\n")
        report = self.check("--prompts", lines, "--prompt-file", text, "--compressor", "kivi:bits=4", "--horizon", 4, "--temperature", 0.7,
                            "--max-tokens", 10)
        self.assertEqual((report["tokens"], len(report["cells"])), (30, 1))
        stopping = self.check("--prompts", lines, "--no-ignore-eos", "--compressor", "kivi:bits=4", "--horizon", 4, "--temperature", 0,
                              "--max-tokens", 10)
        self.assertLessEqual(stopping["tokens"], 20)

    def test_damage_and_delays_change_nothing(self):
        damaged = self.check("--compressor", "kivi:bits=4", "--horizon", 4, "--temperature", 0.7, "--context", 600, "--documents", 2,
                             "--max-tokens", 24, "--inject-corruption-every", 40, "--inject-delay-us", 300)
        self.assertGreater(damaged["corrupt_blocks"], 0)
        self.assertGreater(damaged["recomputed_tokens"], 0)
        sound = self.check("--compressor", "snapkv", "--horizon", 4, "--temperature", 0.7, "--context", 600, "--documents", 2,
                           "--max-tokens", 24, "--inject-delay-us", 300)
        self.assertEqual((sound["corrupt_blocks"], sound["recomputed_tokens"]), (0, 0))

    def test_verdict_for_people(self):
        done = run("check", "--model", MODEL, "--compressor", "kivi:bits=4", "--horizon", 4, "--temperature", 0, "--context", 200,
                   "--documents", 1, "--max-tokens", 8)
        self.assertEqual(done.returncode, 0)
        self.assertRegex(done.stdout.decode(), r"^identical: 8 tokens in 1 cells, 0 mismatches, \d+ rounds, [\d.]+ accepted tokens a round\n$")
        self.assertIn("kivi:bits=4", done.stderr.decode())


class Bench(Folder):
    def test_json(self):
        args = ["bench", "--model", MODEL, "--contexts", "200,400", "--steps", 8, "--repeats", 2]
        done = run(*args, "--json")
        self.assertEqual(done.returncode, 0, done.stderr.decode())
        report = json.loads(done.stdout)
        self.assertEqual([(r["context"], r["mode"]) for r in report["results"]],
                         [(200, "full"), (200, "compressed"), (400, "full"), (400, "compressed")])
        for result in report["results"]:
            least, most = result["decode_spread"]
            self.assertGreater(least, 0)
            self.assertTrue(least <= result["decode_tokens_per_second"] <= most)
            self.assertGreater(result["prefill_tokens_per_second"], 0)
            self.assertGreater(result["read_gbps"], 0)
            self.assertEqual(result["identical"], None if result["mode"] == "full" else True)
            self.assertTrue(0 < result["distinct_8gram_share"] <= 1)
            self.assertLessEqual(result["prompt_tokens"], result["context"])
        self.assertEqual([r["context"] for r in report["ratios"]], [200, 400])
        self.assertGreater(report["results"][0]["read_ceiling_gbps"], 0)
        self.assertEqual(report["command"].split()[:2], ["vericache", "bench"])

    def test_code_and_table(self):
        text = self.file("code.py", "".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(60)))
        done = run("bench", "--model", MODEL, "--contexts", 256, "--steps", 8, "--repeats", 1, "--mode", "full", "--sequences", 2,
                   "--workload", "code", "--prompt-file", text)
        self.assertEqual(done.returncode, 0, done.stderr.decode())
        table = done.stdout.decode()
        self.assertRegex(table, r"\n +256 full ")
        self.assertNotIn("compressed", table)


class Eval(Folder):
    def evaluate(self, *args):
        """The report, the page and the table of a small evaluation."""
        files = [self.folder / "eval.json", self.folder / "eval.html"]
        done = run("eval", "--model", MODEL, "--json", files[0], "--html", files[1], *args)
        self.assertEqual(done.returncode, 0, done.stderr.decode())
        return json.loads(files[0].read_text()), files[1].read_text(), done.stdout.decode()

    def test_verified_equals_full_and_lossy_does_not(self):
        source = self.folder / "tree"
        (source / "part").mkdir(parents=True)
        for i in range(30):
            lines = "".join(f"    total = total * {i + 2} + x[{k}]  # <{k}>\n" for k in range(12))
            (source / "part" / f"f{i}.py").write_text(f"def f{i}(x):\n    total = {i}\n{lines}    return total\n")
        report, page, table = self.evaluate("--workload", "code", "--workload", "calls", "--workload", "needle", "--contexts", 900,
                                            "--documents", 2, "--steps", 60, "--source", source, "--compressor", "none",
                                            "--compressor", "kivi:bits=2", "--compressor", "snapkv:budget=@", "--budget", 70,
                                            "--temperature", 0, "--temperature", 0.6)
        self.assertTrue(report["identical"])
        self.assertIn("tree (30 files)", report["source"])
        cells = report["cells"]
        self.assertEqual([c["compressor"] for c in cells], ["none", "kivi:bits=2", "snapkv:budget=70"] * 6)
        self.assertEqual([c["workload"] for c in cells], ["code"] * 6 + ["calls"] * 6 + ["needle"] * 6)
        for cell in cells:
            self.assertTrue(cell["identical"])
            self.assertIsNone(cell["first_mismatch"])
            self.assertEqual(cell["vericache"], cell["full"], "VeriCache answers what the full cache answers")
            self.assertEqual(cell["full"] is None, cell["workload"] == "code")
            rounds = list(cell["tokens_per_round"].values())
            self.assertEqual(list(cell["tokens_per_round"]), ["4", "16", "64", "128"])
            self.assertEqual(rounds, sorted(rounds), "a longer horizon never takes more rounds")
            self.assertTrue(1 <= rounds[0] <= 5)
            if cell["compressor"] == "none":
                self.assertEqual((cell["agreement"], cell["lossy_alone_same_text"]), (1, 2))
                self.assertEqual(cell["lossy_alone"], cell["full"])
                self.assertEqual((cell["resident_bits_per_value"], cell["wire_bits_per_value"]), (16, None))
                self.assertEqual(cell["verify_wire_bytes"], 0)
            elif cell["compressor"] == "kivi:bits=2":
                self.assertTrue(2 < cell["resident_bits_per_value"] < 3)
                self.assertEqual(cell["wire_bits_per_value"], 16)
            if cell["compressor"] != "none" and cell["workload"] != "needle":
                self.assertLess(cell["agreement"], 1)
                self.assertLess(cell["lossy_alone_same_text"], 2, "a very lossy cache by itself says something else")
                self.assertGreater(cell["wire_bytes_per_accepted_token"], 0)
        greedy_calls = [c for c in cells if c["workload"] == "calls" and c["temperature"] == 0]
        for cell in greedy_calls[1:]:
            self.assertLess(cell["lossy_alone"]["items_share"], greedy_calls[0]["full"]["items_share"])

        tree = xml.etree.ElementTree.fromstring(page)
        svg = "{http://www.w3.org/2000/svg}"
        self.assertEqual(len(list(tree.iter(svg + "svg"))), 3)
        self.assertEqual(len(list(tree.iter("table"))), 3)
        self.assertEqual(len(list(tree.iter(svg + "rect"))), 18 * 3)
        self.assertEqual(len(list(tree.iter("tr"))), 18 + 3)
        self.assertNotIn("<script", page)
        self.assertEqual(table.count("kivi:bits=2"), 6)
        self.assertIn("teacher-forced", table)
        self.assertNotIn(" NO\n", table)

    def test_long_tasks_are_asked(self):
        report, page, _ = self.evaluate("--contexts", 500, "--documents", 1, "--compressor", "kivi:bits=2", "--horizon", 8, "--workload",
                                        "multikey", "--workload", "multivalue", "--workload", "multiquery", "--workload", "variables",
                                        "--workload", "common-words", "--workload", "frequent-words", "--workload", "export",
                                        "--answer-tokens", 60)
        self.assertEqual(len(report["cells"]), 7)
        for cell in report["cells"]:
            self.assertEqual(cell["vericache"], cell["full"])
        xml.etree.ElementTree.fromstring(page)

    def test_bad_requests(self):
        def refused(code, message, *args):
            done = run("eval", "--model", MODEL, *args)
            self.assertEqual(done.returncode, code, done.stderr.decode())
            self.assertRegex(done.stderr.decode(), message)
            self.assertEqual(done.stdout, b"")

        refused(2, "--workload 'poetry' is unknown; there is: code, calls", "--workload", "poetry")
        refused(2, "asks for budgets.*--budget", "--compressor", "snapkv:budget=@")
        refused(2, "stands for the @", "--budget", "0.5")
        refused(2, "--horizon 0 drafts nothing", "--horizon", "0")
        refused(1, "--source .* neither a directory", "--workload", "code", "--source", self.folder / "nowhere")
        refused(1, "--source .* holds no source files", "--workload", "code", "--source", self.folder)
        self.file("small.py", "x = 1\n")
        refused(1, "too few for a context of 500.*--source", "--workload", "code", "--source", self.folder, "--contexts", 500)
        refused(1, "cannot be written", "--workload", "needle", "--json", self.folder / "no" / "where.json")
        refused(1, "context holds 32768", "--workload", "needle", "--contexts", 32768)


class Auto(Folder):
    def test_generate_says_why(self):
        done = run("generate", "--model", MODEL, "--prompt", FUNCTION, "--max-tokens", 12, "--compressor", "auto", "--compare-full", "--json")
        self.assertEqual(done.returncode, 0, done.stderr.decode())
        told = json.loads(done.stdout)
        self.assertTrue(told["compare_full"]["identical"])
        self.assertRegex(told["compressor_reason"], r"^[a-z].*tokens/s expected.*; next best ")
        self.assertTrue(told["compressor_reason"].startswith(told["compressor"] + ": "))
        self.assertEqual(done.stderr.decode().count("compressor auto: "), 1)
        self.assertNotIn("compressor_reason", generate("--max-tokens", 2))

    def test_a_tight_device_gets_a_compressed_cache(self):
        prompt = DOCUMENT.read_text()[:24000]
        done = run("generate", "--model", MODEL, "--prompt", prompt, "--max-tokens", 12, "--compressor", "auto", "--device-memory", "28M",
                   "--wire-gbps", 0.1, "--prefill-chunk", 160, "--max-horizon", 32, "--json", "--ring-layers", 1)
        self.assertEqual(done.returncode, 0, done.stderr.decode())
        self.assertNotEqual(json.loads(done.stdout)["compressor"], "none")

    def test_check_and_bench(self):
        done = run("check", "--model", MODEL, "--compressor", "auto", "--horizon", 4, "--temperature", 0, "--context", 300, "--documents", 1,
                   "--max-tokens", 8)
        self.assertEqual(done.returncode, 0, done.stderr.decode())
        self.assertIn("compressor auto: ", done.stderr.decode())
        done = run("bench", "--model", MODEL, "--contexts", "300", "--steps", 8, "--repeats", 1, "--compressor", "auto", "--json")
        self.assertEqual(done.returncode, 0, done.stderr.decode())
        report = json.loads(done.stdout)
        self.assertEqual((report["compressor"], report["results"][0]["compressor"]), ("auto", "none"))
        self.assertIn(report["results"][1]["compressor"] + ": ", done.stderr.decode())

    def test_horizon_zero_is_refused(self):
        done = run("generate", "--model", MODEL, "--prompt", "x", "--compressor", "auto", "--horizon", 0)
        self.assertEqual(done.returncode, 2)


class Logits(Folder):
    def test_every_position(self):
        ids = self.file("ids.json", json.dumps([(7 * i * i + 3 * i) % 8192 for i in range(100)]))
        files = []
        for chunk in (512, 33):
            out = self.folder / f"{chunk}.safetensors"
            done = run("logits", "--model", MODEL, "--ids-file", ids, "--out", out, "--prefill-chunk", chunk, "--json")
            self.assertEqual(done.returncode, 0, done.stderr.decode())
            report = json.loads(done.stdout)
            self.assertEqual((report["tokens"], report["predicted_tokens"]), (100, 99))
            files.append((out.read_bytes(), report["perplexity"]))
        self.assertEqual(files[0], files[1], "the chunk must not show in a single bit")
        content, perplexity = files[0]
        size = struct.unpack("<Q", content[:8])[0]
        tensor = json.loads(content[8 : 8 + size])["logits"]
        self.assertEqual((tensor["dtype"], tensor["shape"]), ("F32", [100, 8192]))
        self.assertEqual(len(content) - 8 - size, 100 * 8192 * 4)
        self.assertGreater(perplexity, 100, "random tokens surprise the model")

    def test_perplexity_of_text(self):
        done = run("logits", "--model", MODEL, "--prompt-file", "-", stdin=b"for i in range(10):\n    print(i)\n")
        match = re.fullmatch(r"perplexity ([\d.]+) over (\d+) tokens\n", done.stdout.decode())
        self.assertTrue(match, done.stderr.decode())
        self.assertLess(float(match[1]), 100)


class Inspect(unittest.TestCase):
    def test_json(self):
        done = run("inspect", "--model", MODEL, "--json")
        self.assertEqual(done.returncode, 0, done.stderr.decode())
        model = json.loads(done.stdout)
        self.assertEqual(model["family"], "llama")
        self.assertEqual((model["parameters"], model["layers"], model["vocabulary"]), (5245184, 4, 8192))
        self.assertEqual(model["kv_bytes_per_token"], 2 * 4 * 2 * 64 * 2)
        self.assertLess(model["compressors"]["kivi:bits=4"]["resident_bytes_per_token"], 0.3 * model["kv_bytes_per_token"])
        self.assertEqual(model["compressors"]["none"]["resident_bytes_per_token"], model["kv_bytes_per_token"])
        self.assertEqual(model["tokenizer"]["kind"], "byte-level BPE")
        self.assertIn("portable", model["backends"]["cpu"]["isa"])

    def test_text(self):
        done = run("inspect", "--model", MODEL)
        self.assertEqual(done.returncode, 0)
        for word in ("llama", "parameters", "5.2 M", "context", "tokenizer", "full KV", "kivi:bits=4"):
            self.assertIn(word, done.stdout.decode())


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    BINARY = os.path.abspath(sys.argv[1])
    MODEL = os.path.join(os.path.abspath(sys.argv[2]), "vericode-5m")
    if not os.path.exists(os.path.join(MODEL, "config.json")):
        sys.exit(f"{MODEL} is missing: `make build` unpacks it")
    unittest.main(argv=[sys.argv[0], *sys.argv[3:]], verbosity=1)
