"""A .gguf file of a small llama, made on the spot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFWriter


def gguf_file(path: Path, lost: str = "", layers: int = 2, architecture: str = "llama") -> Path:
    """Write a model of two layers, hidden size 32 and 16 tokens; return the file.

    Args:
        path: where to write.
        lost: the name of a tensor that is left out, without `.weight`.
        layers: how many layers the file says it has.
        architecture: what the file says it is.
    """
    rng = np.random.default_rng(0)
    writer = GGUFWriter(str(path), architecture)
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(16)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*"abcdefghijklm", "ab", "<s>", "</s>"])
    writer.add_token_types([1] * 14 + [3, 3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(14)
    writer.add_eos_token_id(15)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (16, 32), "output_norm": (32,)}
    for i in range(2):
        shapes |= {f"blk.{i}.{name}": (32, 32) for name in ("attn_q", "attn_output")}
        shapes |= {f"blk.{i}.{name}": (16, 32) for name in ("attn_k", "attn_v")}
        shapes |= {f"blk.{i}.{name}": (48, 32) for name in ("ffn_gate", "ffn_up")}
        shapes |= {f"blk.{i}.ffn_down": (32, 48)}
        shapes |= {f"blk.{i}.{name}": (32,) for name in ("attn_norm", "ffn_norm")}
    for name, shape in shapes.items():
        if name != lost:
            writer.add_tensor(f"{name}.weight", rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
