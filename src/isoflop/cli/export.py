"""isoflop export"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from isoflop.cli.options import Bytes, Json
from isoflop.cli.output import emit, note, say
from isoflop.errors import InputError
from isoflop.quantity.units import format_bytes, format_exact

if TYPE_CHECKING:
    from isoflop.model import Decoder


def export(
    run: Path,
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    to: Literal["hf"] = "hf",
    precision: Literal["fp32", "bf16", "fp16"] | None = None,
    max_shard: Bytes | None = None,
    as_json: Json = False,
) -> None:
    """Write a run's newest checkpoint as a folder that other software reads.

    Parameters
    ----------
    run
        A run directory of `isoflop train`; it may still be running.
    output
        The folder to make, new or empty.
    to
        hf: config.json, safetensors and a tokenizer of bytes, for transformers' `from_pretrained`.
    precision
        What to cast the weights to; as the checkpoint has them when not given.
    max_shard
        Largest file, 5GB when not given; more goes into shards with an index.
    """
    import torch

    from isoflop.infer.tokens import byte_tokenizer_files
    from isoflop.model.weights.write import MAX_SHARD_BYTES, save_model
    from isoflop.train.data import SEPARATOR
    from isoflop.train.trained import load_trained

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, None: None}
    trained = load_trained(run)
    for line in trained.notes:
        note(line)
    _say_scale(trained.model)
    most = max_shard or MAX_SHARD_BYTES
    beside = byte_tokenizer_files(trained.model.arch.max_seq_len)
    beside["generation_config.json"] = json.dumps({"eos_token_id": SEPARATOR[0]}, indent=2) + "\n"
    save_model(trained.model, output, dtype=dtypes[precision], max_shard_bytes=most, beside=beside)
    sizes = {path.name: path.stat().st_size for path in sorted(output.iterdir())}
    data: dict[str, Any] = {
        "run_dir": str(run),
        "output": str(output),
        "to": to,
        "step": trained.step,
        "files": [{"name": name, "bytes": size} for name, size in sizes.items()],
    }
    if as_json:
        return emit("export", data)
    return say(
        f"{output}: {run} at step {format_exact(trained.step)}, "
        f"{format_bytes(sum(sizes.values()))} in {', '.join(sizes)}"
    )


def _say_scale(model: Decoder) -> None:
    """Put a scale of logits that no config can say, as muP's, into the final norm."""
    from isoflop.arch.hf import to_hf
    from isoflop.model.weights.fold import fold_head_scale

    scale = model.arch.head.scale
    if scale == 1:
        return
    try:
        to_hf(model.arch)
    except InputError:
        if fold_head_scale(model):
            note(f"head.scale {scale:g} is in the final norm's weights: no config here can say it")
