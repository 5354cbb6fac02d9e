"""Our Triton kernels where there is no GPU: right in the interpreter, and compiled for GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed: make test-triton installs it"
)

HERE = Path(__file__).parent


def test_the_kernels_are_right_in_tritons_interpreter():
    script = str(HERE / "interpreted_attention.py")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
        script,
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stdout[-8000:] + done.stderr[-2000:]


#: Pointers of the kernels to numbers of another type than the tokens'.
POINTERS = {
    **dict.fromkeys(("Lse", "Base", "Flow", "D_lse", "Slope", "Sink", "D_scores"), "*fp32"),
    **dict.fromkeys(("List", "Count", "StartQ", "StartK"), "*i32"),
    "Seen": "*u8",
}
NUMBERS = {"scale": "fp32", "softcap": "fp32", "keep_scale": "fp32", "seed": "i64"}


def signature(kernel, constants):
    """Types of a kernel's arguments for bfloat16 tokens."""
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in POINTERS:
            types[name] = POINTERS[name]
        elif (name[0].isupper() and len(name) > 1) or name in "QKV":
            types[name] = "*bf16"
        else:
            types[name] = NUMBERS.get(name, "i32")
    return {n: "i32" if n == "LENGTH" else t for n, t in types.items()}


def test_every_pass_compiles_for_a_gpu_with_all_features(tmp_path, monkeypatch):
    """Ahead of time, without a GPU: what the interpreter lets pass, the compiler may not."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from isoflop.attention.kernels import backward, forward, tile

    bits = (tile.CAUSAL, tile.WINDOW, tile.SOFTCAP, tile.ALIBI, tile.BIAS, tile.PACKED)
    some = sum(bit.value for bit in (*bits, tile.DROPOUT, tile.SINKS, tile.D_BIAS))
    sizes = {"G": 4, "H": 12, "HV": 12, "WH": 16, "WV": 16, "PRECISION": "ieee"}
    for features in (some, tile.HIDE.value | tile.BLOCKS.value):
        constants = {**sizes, "F": features, "BM": 16, "BN": 16}
        for kernel in (forward.forward, backward.backward_kv, backward.backward_q):
            source = ASTSource(kernel, signature(kernel, constants), constants)
            options = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
            triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options)
