"""One llama.cpp model with one context and one sequence, through llama-cpp-python's low-level binding.

No sampler, no detokenizer, batches built ahead: what a caller times is llama_process and little else.
"""

import contextlib
import ctypes
from dataclasses import asdict, dataclass
from pathlib import Path

import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType

KV_TYPES = {"f16": GGMLQuantizationType.F16, "bf16": GGMLQuantizationType.BF16, "f32": GGMLQuantizationType.F32}
LOGICAL_BATCH_TOKENS = 2048  # llama.cpp's own default; ubatch is what is computed at a time


@llama_cpp.llama_log_callback
def _drop_log(level, text, user_data):
    pass


@dataclass(frozen=True)
class Settings:
    """What may change llama.cpp's speed and not its task."""

    gguf: str
    flash: bool
    kv: str  # a key of KV_TYPES
    ubatch: int

    def __str__(self):
        return f"{Path(self.gguf).stem} flash={'on' if self.flash else 'off'} kv={self.kv} ubatch={self.ubatch}"

    def to_json(self):
        return asdict(self)


@contextlib.contextmanager
def loaded_model(path):
    llama_cpp.llama_log_set(_drop_log, None)
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {path}; convert it again with convert_to_gguf.py")
    try:
        yield model
    finally:
        llama_cpp.llama_model_free(model)


class Session:
    """A context over a loaded model. process() appends tokens; truncate() takes them back."""

    def __init__(self, model, settings, capacity_tokens, threads):
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = capacity_tokens
        params.n_batch = max(LOGICAL_BATCH_TOKENS, settings.ubatch)
        params.n_ubatch = settings.ubatch
        params.n_seq_max = 1
        params.n_threads = threads
        params.n_threads_batch = threads
        params.type_k = KV_TYPES[settings.kv]
        params.type_v = KV_TYPES[settings.kv]
        params.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if settings.flash else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        params.offload_kqv = False
        params.op_offload = False
        params.no_perf = False
        self._context = llama_cpp.llama_init_from_model(model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp refuses a context of {capacity_tokens} tokens with {settings}")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batches = []
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def close(self):
        for batch in self._batches:
            llama_cpp.llama_batch_ext_free(batch)
        llama_cpp.llama_free(self._context)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def batches(self, ids, position, batch_tokens=LOGICAL_BATCH_TOKENS):
        """The ids from `position` on, cut into batches of at most batch_tokens; each gives its last token's logits.

        Built ahead, so that process() times llama.cpp alone. They may be processed again after truncate(position).
        """
        made = []
        for begin in range(0, len(ids), batch_tokens):
            batch = llama_cpp.llama_batch_ext_init(self._context)
            self._batches.append(batch)
            made.append(batch)
            for offset, token in enumerate(ids[begin : begin + batch_tokens], start=begin):
                index = llama_cpp.llama_batch_ext_add_token(batch, 0, token)
                if index < 0:
                    raise RuntimeError(f"llama_batch_ext_add_token returned {index} for token {token}")
                where = llama_cpp.llama_pos(position + offset)
                llama_cpp.llama_batch_ext_set_pos(batch, index, ctypes.byref(where))
            llama_cpp.llama_batch_ext_set_output_logits(batch, index, True)
        return made

    def process(self, batches):
        """Appends the batches' tokens, one call for each, and returns when they are computed."""
        process, synchronize, context = llama_cpp.llama_process, llama_cpp.llama_synchronize, self._context
        for batch in batches:
            status = process(context, llama_cpp.LLAMA_PROCESS_TYPE_DECODE, batch)
            synchronize(context)
            if status != 0:
                raise RuntimeError(f"llama_process returned {status}")

    def truncate(self, tokens):
        """Forgets every token at position `tokens` and later."""
        llama_cpp.llama_memory_seq_rm(self._memory, 0, tokens, -1)

    def last_logits(self):
        """A copy of the newest row of logits, float32."""
        row = llama_cpp.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(row, shape=(self.vocabulary,)).copy()

    def reset_inner_clock(self):
        llama_cpp.llama_perf_context_reset(self._context)

    def inner_decode_seconds(self):
        """llama.cpp's own account of single-token decoding since reset_inner_clock(); excludes Python."""
        return llama_cpp.llama_perf_context(self._context).t_eval_ms / 1000.0
