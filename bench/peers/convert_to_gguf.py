#!/usr/bin/env python3
"""Converts a Hugging Face Llama directory to GGUF, so that llama.cpp can run the same weights.

    convert_to_gguf.py build/models/vericode-26m vericode-26m-bf16.gguf --type bf16

Only what the bundled models use is supported (Llama, plain RoPE, byte-level BPE, no biases); anything else is refused.
Token ids and logits are those of the original; check_gguf.py holds them against the model's golden files.
"""

import argparse
import json
import sys
from pathlib import Path

import gguf
import numpy as np
from safetensors import deserialize

# The only pre-tokenizer pattern whose GGUF name is known to this script: Llama 3's.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Refused(Exception):
    """The directory holds something that this script cannot carry over exactly."""


def read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refused(f"cannot read {path}: {error}") from error


def read_config(model_dir):
    config = read_json(model_dir / "config.json")
    if config.get("model_type") != "llama":
        raise Refused(f"{model_dir}: model_type is {config.get('model_type')!r}; only 'llama' is supported")
    rope = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type")) or rope.get("rope_type") or "default"
    if kind != "default":
        raise Refused(f"{model_dir}: rope type {kind!r} is not supported, only 'default'")
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise Refused(f"{model_dir}: biases are not supported")
    if config.get("hidden_act", "silu") != "silu":
        raise Refused(f"{model_dir}: hidden_act is {config['hidden_act']!r}; only 'silu' is supported")
    heads = config["num_attention_heads"]
    config.setdefault("num_key_value_heads", heads)
    config["head_dim"] = config.get("head_dim") or config["hidden_size"] // heads
    config["rope_theta"] = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    return config


def read_tensors(model_dir):
    """name -> (dtype, array); bf16 is returned as its uint16 bits, which numpy can hold."""
    numpy_types = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}
    tensors = {}
    for path in sorted(model_dir.glob("*.safetensors")):
        for name, entry in deserialize(path.read_bytes()):
            if entry["dtype"] not in numpy_types:
                raise Refused(f"{path}: tensor {name} is {entry['dtype']}; BF16, F16 and F32 are supported")
            array = np.frombuffer(entry["data"], dtype=numpy_types[entry["dtype"]]).reshape(entry["shape"])
            tensors[name] = (entry["dtype"], array)
    if not tensors:
        raise Refused(f"{model_dir}: no *.safetensors file")
    return tensors


def to_float32(dtype, array):
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def to_bf16_bits(dtype, array):
    if dtype == "BF16":
        return array
    bits = to_float32(dtype, array).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)  # round to nearest, ties to even


def interleave_rope_halves(array, heads):
    """Reorders the rows of a q or k projection for GGUF's 'llama' RoPE.

    Hugging Face rotates dimension i of a head together with i + head_dim/2; llama.cpp rotates 2i together with 2i + 1.
    """
    rows, columns = array.shape
    return array.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def gguf_name(name):
    """The GGUF name of a Hugging Face tensor."""
    outer = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    inner = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    if name in outer:
        return outer[name]
    if name.startswith("model.layers.") and name.endswith(".weight"):
        layer, _, part = name.removeprefix("model.layers.").removesuffix(".weight").partition(".")
        if layer.isdigit() and part in inner:
            return f"blk.{layer}.{inner[part]}.weight"
    raise Refused(f"tensor {name} has no place in GGUF's 'llama' architecture")


def place_in_file(name):
    """Sort key: outer tensors, then layer by layer. The reader's own order is another one every time."""
    layer = name.removeprefix("model.layers.").partition(".")[0]
    return (int(layer) if layer.isdigit() else -1, name)


def add_tensors(writer, config, tensors, weight_type):
    for name in sorted(tensors, key=place_in_file):
        dtype, array = tensors[name]
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue  # llama.cpp uses token_embd.weight where output.weight is missing
        if name.endswith("q_proj.weight"):
            array = interleave_rope_halves(array, config["num_attention_heads"])
        elif name.endswith("k_proj.weight"):
            array = interleave_rope_halves(array, config["num_key_value_heads"])
        if array.ndim == 1:
            writer.add_tensor(gguf_name(name), to_float32(dtype, array))  # llama.cpp wants norm weights in f32
        elif weight_type == "bf16":
            raw = np.ascontiguousarray(to_bf16_bits(dtype, array)).view(np.uint8)
            writer.add_tensor(gguf_name(name), raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            values = to_float32(dtype, array)
            if np.abs(values).max() > np.finfo(np.float16).max:
                raise Refused(f"tensor {name} does not fit f16; use --type bf16")
            writer.add_tensor(gguf_name(name), values.astype(np.float16))


def pre_tokenizer_name(tokenizer):
    """The name under which llama.cpp knows the model's split pattern, or None where the pattern is another one."""
    steps = (tokenizer.get("pre_tokenizer") or {}).get("pretokenizers", [])
    patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    if patterns != [LLAMA3_PATTERN]:
        return None
    # llama.cpp splits alike under both names; 'llama-bpe' also takes a whole word of the vocabulary without merging.
    return "llama-bpe" if tokenizer["model"].get("ignore_merges") else "dbrx"


def add_tokenizer(writer, model_dir, config):
    tokenizer = read_json(model_dir / "tokenizer.json")
    if tokenizer["model"].get("type") != "BPE":
        raise Refused(f"{model_dir}: the tokenizer is not BPE")
    name = pre_tokenizer_name(tokenizer)
    if name is None:
        print(
            "warning: the pre-tokenizer is not Llama 3's; llama.cpp will split text differently (token ids passed "
            "directly are not affected)",
            file=sys.stderr,
        )
    by_id = {token_id: (text, gguf.TokenType.NORMAL) for text, token_id in tokenizer["model"]["vocab"].items()}
    for added in tokenizer.get("added_tokens", []):
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        by_id[added["id"]] = (added["content"], kind)
    entries = [by_id.get(i) or (f"[unused {i}]", gguf.TokenType.UNUSED) for i in range(config["vocab_size"])]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name or "llama-bpe")
    writer.add_token_list([text for text, _ in entries])
    writer.add_token_types([kind for _, kind in entries])
    writer.add_token_merges(merges)
    for key, add in (("bos_token_id", writer.add_bos_token_id), ("eos_token_id", writer.add_eos_token_id)):
        token_id = config.get(key)
        token_id = token_id[0] if isinstance(token_id, list) else token_id
        if token_id is not None:
            add(token_id)
    writer.add_add_bos_token(False)


def convert(model_dir, out, weight_type):
    config = read_config(model_dir)
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_name(model_dir.resolve().name)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(float(config["rope_theta"]))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_vocab_size(config["vocab_size"])
    file_type = gguf.LlamaFileType.MOSTLY_BF16 if weight_type == "bf16" else gguf.LlamaFileType.MOSTLY_F16
    writer.add_file_type(file_type)
    add_tokenizer(writer, model_dir, config)
    add_tensors(writer, config, read_tensors(model_dir), weight_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    parser = argparse.ArgumentParser(description="Convert a Hugging Face Llama directory to GGUF.")
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", choices=("bf16", "f16"), default="bf16", help="matrix weights (default: bf16)")
    args = parser.parse_args()
    partial = args.out.with_name(args.out.name + ".part")  # an interrupted run leaves no file that looks whole
    try:
        convert(args.model_dir, partial, args.type)
    except (Refused, KeyError) as error:
        partial.unlink(missing_ok=True)
        reason = f"config.json or tokenizer.json lacks {error}" if isinstance(error, KeyError) else error
        sys.exit(f"convert_to_gguf: {reason}")
    partial.replace(args.out)
    print(f"{args.out}: {args.out.stat().st_size} bytes, {args.type}")


if __name__ == "__main__":
    main()
