"""Decode steps of Hugging Face transformers on a GPU: the 8B shape with random weights, a cache of random KV, SDPA.

    python3 bench/peers/transformers_step.py --batch 1 16 --context 31232 --json report.json

What `vericache bench --device cuda --mode full` is held against, on the same GPU: full KV, the same shape and vocabulary,
one new token for each sequence a step. `dynamic` is what generate() uses by default, `static` allocates its room before.
A cache that does not fit, or that this version fills in another way, is reported and passed over.

Needs PyTorch with CUDA and transformers (seen: 2.11 and 5.17), 15 GB for the weights and 128 KiB a token and sequence
(65 GB at 16 x 31,232), and room for a layer more.
"""

import argparse
import json
import os
import statistics
import time

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache  # noqa: E402

WARM = 3


def build_model(arguments):
    config = LlamaConfig(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        head_dim=arguments.hidden // arguments.heads,
        vocab_size=arguments.vocabulary,
        max_position_embeddings=1 << 17,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(arguments.device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    assert model.lm_head.weight.dtype == torch.bfloat16, model.lm_head.weight.dtype
    return model.eval()


def filled_cache(kind, model, batch, context, room):
    config = model.config
    cache = DynamicCache() if kind == "dynamic" else StaticCache(config=config, max_cache_len=context + room)
    shape = (batch, config.num_key_value_heads, context, config.head_dim)
    positions = torch.arange(context, device=model.device)
    for layer in range(config.num_hidden_layers):
        key, value = (torch.rand(shape, device=model.device, dtype=torch.bfloat16) * 2 - 1 for _ in "kv")
        cache.update(key, value, layer, {"cache_position": positions})
    held = int(cache.get_seq_length())
    if held != context:
        raise RuntimeError(f"the cache holds {held} tokens, not {context}")
    return cache


def synchronize(device):
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def measure(kind, model, batch, arguments):
    """Milliseconds of each timed step."""
    cache = filled_cache(kind, model, batch, arguments.context, WARM + arguments.steps)
    tokens = torch.full((batch, 1), 7, device=model.device)
    times = []
    for step in range(WARM + arguments.steps):
        position = torch.tensor([arguments.context + step], device=model.device)
        synchronize(arguments.device)
        begin = time.perf_counter()
        out = model(input_ids=tokens, past_key_values=cache, position_ids=position[None].expand(batch, 1), use_cache=True)
        tokens = out.logits[:, -1].argmax(dim=-1, keepdim=True)
        synchronize(arguments.device)
        times.append(1e3 * (time.perf_counter() - begin))
    return times[WARM:]


def kv_bytes(config, batch, tokens):
    return 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * batch * tokens


def report(kind, model, batch, arguments):
    try:
        times = measure(kind, model, batch, arguments)
    except (torch.cuda.OutOfMemoryError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        print(f"{kind:8} batch {batch:3}: not measured: {reason[:120]}", flush=True)
        return {"cache": kind, "batch": batch, "error": reason}
    ms = statistics.median(times)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    read = weights + kv_bytes(model.config, batch, arguments.context)
    print(
        f"{kind:8} batch {batch:3}: {ms:9.2f} ms ({min(times):.2f} ... {max(times):.2f})  {1e3 * batch / ms:8.1f} tokens/s"
        f"  {read / ms * 1e-6:7.0f} GB/s of weights and KV",
        flush=True,
    )
    return {"cache": kind, "batch": batch, "step_ms": ms, "times_ms": times, "tokens_per_second": 1e3 * batch / ms}


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--context", type=int, default=31232)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--cache", nargs="+", choices=("dynamic", "static"), default=["dynamic", "static"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", help="where to write the results")
    for name, value in (
        ("vocabulary", 8192),
        ("layers", 32),
        ("hidden", 4096),
        ("intermediate", 14336),
        ("heads", 32),
        ("kv-heads", 8),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    return parser.parse_args()


def main():
    arguments = parse()
    torch.manual_seed(1)
    name = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else arguments.device
    print(f"transformers {transformers.__version__}, PyTorch {torch.__version__}, {name}; context {arguments.context}")
    model = build_model(arguments)
    results = []
    for batch in arguments.batch:
        for kind in arguments.cache:
            results.append(report(kind, model, batch, arguments))
            if arguments.device.startswith("cuda"):
                torch.cuda.empty_cache()
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as f:
            json.dump({"transformers": transformers.__version__, "torch": torch.__version__, "results": results}, f, indent=1)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
