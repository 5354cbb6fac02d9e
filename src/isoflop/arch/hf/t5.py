"""T5 1.0 and 1.1."""

from __future__ import annotations

from typing import Any

from isoflop.arch.families import t5
from isoflop.arch.hf.config import Config
from isoflop.arch.hf.family import Facts, Family, flag, layers, real, size, size_or_none, word
from isoflop.arch.hf.words import ACTIVATIONS
from isoflop.arch.spec import Arch, Attention, Dense, RelativeBias

#: The feed-forward's word says its activation and whether it is gated; "gated-gelu" is tanh's.
_PLAIN = {said: (means, False) for said, means in ACTIVATIONS.items()}
_GATED = {f"gated-{said}": (means, True) for said, means in ACTIVATIONS.items()}
FEED_FORWARDS = _PLAIN | _GATED | {"gated-gelu": ("gelu_tanh", True)}


def _finish(keys: Config, numbers: Facts) -> None:
    """transformers 5 ties every T5 until it loads its weights; an unscaled head marks 1.1."""
    numbers["activation"], numbers["gated"] = numbers.pop("feed_forward")
    if keys.has("scale_decoder_outputs") and not keys.flag("scale_decoder_outputs", True):
        numbers["tied"] = False


def _more(arch: Arch, _facts: Facts) -> dict[str, Any]:
    if arch.encoder is None:
        raise KeyError("encoder")
    attention = arch.layers[0].attention
    dense = arch.layers[0].feed_forward
    if not isinstance(attention, Attention) or not isinstance(dense, Dense):
        raise KeyError("attention")
    if not isinstance(attention.position, RelativeBias):
        raise KeyError("relative_bias")
    words = {means: said for said, means in reversed(FEED_FORWARDS.items())}
    return {
        "feed_forward_proj": words[dense.activation, dense.gated],
        "num_layers": len(arch.encoder.layers),
        "num_decoder_layers": arch.n_layers,
        "relative_attention_num_buckets": attention.position.n_buckets,
        "relative_attention_max_distance": attention.position.max_distance,
    }


T5 = Family(
    "t5",
    "T5ForConditionalGeneration",
    t5,
    {
        "d_model": size("d_model", 512),
        "num_layers": layers(6),
        "num_decoder_layers": size_or_none("n_decoder_layers"),
        "num_heads": size("n_heads", 8),
        "d_kv": size("d_head", 64),
        "d_ff": size("d_ff", 2048),
        "vocab_size": size("vocab_size", 32128),
        "n_positions": size("max_seq_len", 512),
        "feed_forward_proj": word("feed_forward", "relu", FEED_FORWARDS),
        "relative_attention_num_buckets": size("n_buckets", 32),
        "relative_attention_max_distance": size("max_distance", 128),
        "layer_norm_epsilon": real("eps", 1e-6),
        "dropout_rate": real("dropout", 0.1),
        "tie_word_embeddings": flag("tied", True),
    },
    second_names={
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "head_dim": "d_kv",
    },
    ignored=frozenset({"dense_act_fn", "is_gated_act", "output_past"}),
    finish=_finish,
    more=_more,
)

FAMILIES = (T5,)
