"""PyTorch's scaled_dot_product_attention on the decode and prefill shapes of attention_bench: GB/s of KV read, TFLOP/s.

Run it right before or after attention_bench, on the same GPU. Medians of event-timed calls on random data; caches are
contiguous, (sequences, kv_heads, tokens, head_dim). Calls of a few microseconds show the time of the host instead.
"""

import statistics

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
WARM, TIMED = 4, 25


def median_us(call, variants):
    """Median time of a call; it is given 0, 1, ... `variants` - 1 in turn, to read other memory each time."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(WARM + TIMED)]
    for i, (start, stop) in enumerate(events):
        start.record()
        call(i % variants)
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(1e3 * start.elapsed_time(stop) for start, stop in events[WARM:])


def random(*shape):
    return torch.rand(shape, device="cuda", dtype=torch.bfloat16) * 2 - 1


def grouped(q, k, v, causal):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def as_rows(q, k, v, causal):
    """The query heads of a group as rows of one head: the same result for a single query row."""
    rows = q.view(q.shape[0], KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)
    return torch.nn.functional.scaled_dot_product_attention(rows, k, v, is_causal=causal)


def measure(what, backend, form, batch, rows, tokens):
    kv_bytes = 2 * 2 * batch * KV_HEADS * HEAD_DIM * tokens
    variants = max(1, min(16, (2 << 30) // kv_bytes))
    causal = rows > 1
    q = random(batch, HEADS, rows, HEAD_DIM)
    kv = [[random(batch, KV_HEADS, tokens, HEAD_DIM) for _ in "kv"] for _ in range(variants)]
    try:
        with sdpa_kernel([backend]):
            us = median_us(lambda i: form(q, *kv[i], causal), variants)
    except RuntimeError as error:
        print(f"{what:34} {backend.name:20} {form.__name__:9} refused: {str(error).splitlines()[0][:60]}")
        return
    seen = rows * (rows + 1) / 2 if causal else rows * tokens
    tflops = 4 * HEAD_DIM * HEADS * batch * seen / us * 1e-6
    print(f"{what:34} {backend.name:20} {form.__name__:9} {us:10.1f} {kv_bytes / us * 1e-3:10.0f} {tflops:10.1f}")


def main():
    torch.manual_seed(1)
    backends = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
    print(f"PyTorch {torch.__version__}, {torch.cuda.get_device_name()}")
    print(f"{'':34} {'backend':20} {'queries':9} {'us':>10} {'GB/s':>10} {'TFLOP/s':>10}")
    for tokens in (8192, 32768):
        for batch in (1, 8, 16):
            for backend in backends:
                for form in (grouped, as_rows):
                    measure(f"decode, batch {batch}, {tokens >> 10}k", backend, form, batch, 1, tokens)
    for backend in backends:
        measure("prefill, 8k x 8k, causal", backend, grouped, 1, 8192, 8192)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
