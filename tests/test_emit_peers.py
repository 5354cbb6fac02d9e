"""Emitted plans in the hands of the trainers themselves: `make test-emit` installs them.

Megatron-LM's parser is no package. Megatron-Core is, and the parser makes a flag of each field
of its TransformerConfig; what it adds by hand is written down here (BY_HAND).
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from isoflop.arch import Arch
from isoflop.arch.spec import Experts, Rope
from isoflop.arch.zoo import entry
from isoflop.count import params
from isoflop.hardware import parse_cluster
from isoflop.plan import Layout, TrainPlan, plan_train
from isoflop.plan.emit import emitted
from isoflop.plan.emit.asked import layers_by_chunk
from isoflop.plan.emit.flavours import EIGHT_BITS, FLAVOURS, Flavour
from isoflop.plan.emit.megatron_limits import unsaid_model

pytestmark = pytest.mark.filterwarnings("ignore")  # what the trainers warn of is theirs


SPLIT = Layout(dp=8, zero=1)


def planned(arch: Arch, layout: Layout = SPLIT, **more: Any) -> TrainPlan:
    """A plan for accelerators of much memory."""
    more = {"global_batch": 64 * layout.dp, "seq_len": 1024, **more}
    return plan_train(arch, 10**9, parse_cluster("64xb300-sxm"), layout=layout, **more)


def shallow(arch: Arch) -> Arch:
    """Few layers, all kinds among them: every width stays."""
    kinds = [arch.layers.index(layer) for layer in arch.kinds.values()]
    return replace(arch, layers=arch.layers[: max(kinds) + 2])


# --- Megatron-LM --------------------------------------------------------------------------------


def bits(text: str) -> list[int]:
    """[0]*1+([1]*2)*3 as Megatron reads it: an expression of lists of numbers."""
    assert re.fullmatch(r"[\d\[\],()+*]+", text)
    return list(eval(text))  # checked above, as Megatron checks it


def pair(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def one_of(*choices: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(text)
        return text

    return read


#: Flags that megatron/training/arguments.py (February 2026) adds to those of TransformerConfig:
#: the field that each sets, where it sets one, and how its value is read; None is a switch.
BY_HAND: dict[str, tuple[str, Callable[[str], Any] | None]] = {
    "--max-position-embeddings": ("max_position_embeddings", int),
    "--vocab-size": ("vocab_size", int),
    "--make-vocab-size-divisible-by": ("make_vocab_size_divisible_by", int),
    "--untie-embeddings-and-output-weights": ("untie_embeddings_and_output_weights", None),
    "--position-embedding-type": (
        "position_embedding_type",
        one_of("learned_absolute", "rope", "none"),
    ),
    "--rotary-base": ("rotary_base", int),
    "--rotary-percent": ("rotary_percent", float),
    "--rotary-seq-len-interpolation-factor": ("rotary_seq_len_interpolation_factor", int),
    "--use-rope-scaling": ("use_rope_scaling", None),
    "--rope-scaling-factor": ("rope_scaling_factor", float),
    "--rope-type": ("rope_type", one_of("rope", "yarn")),
    "--no-rope-freq": ("no_rope_freq", bits),
    "--no-rope-fusion": ("no_rope_fusion", None),
    "--group-query-attention": ("group_query_attention", None),
    "--window-size": ("window_size", pair),
    "--window-attn-skip-freq": ("window_attn_skip_freq", bits),
    "--squared-relu": ("squared_relu", None),
    "--swiglu": ("swiglu", None),
    "--quick-geglu": ("quick_geglu", None),
    "--no-bias-gelu-fusion": ("no_bias_gelu_fusion", None),
    "--num-experts": ("num_moe_experts", int),
    "--moe-layer-freq": ("moe_layer_freq", bits),
    "--q-lora-rank": ("q_lora_rank", int),
    "--kv-lora-rank": ("kv_lora_rank", int),
    "--qk-head-dim": ("qk_head_dim", int),
    "--qk-pos-emb-head-dim": ("qk_pos_emb_head_dim", int),
    "--v-head-dim": ("v_head_dim", int),
    "--rotary-scaling-factor": ("rotary_scaling_factor", float),
    "--mscale": ("mscale", float),
    "--mscale-all-dim": ("mscale_all_dim", float),
    "--pipeline-model-parallel-layout": ("pipeline_model_parallel_layout", str),
    "--num-virtual-stages-per-pipeline-rank": ("virtual_pipeline_model_parallel_size", int),
    "--micro-batch-size": ("micro_batch_size", int),
    "--global-batch-size": ("global_batch_size", int),
    "--seq-length": ("seq_length", int),
    "--train-iters": ("train_iters", int),
    "--lr": ("lr", float),
    "--use-distributed-optimizer": ("use_distributed_optimizer", None),
    "--use-megatron-fsdp": ("use_megatron_fsdp", None),
    "--data-parallel-sharding-strategy": (
        "data_parallel_sharding_strategy",
        one_of("optim_grads", "optim_grads_params"),
    ),
    "--no-gradient-accumulation-fusion": ("no_gradient_accumulation_fusion", None),
    "--ckpt-format": ("ckpt_format", one_of("torch", "torch_dist", "torch_dcp", "fsdp_dtensor")),
}


def megatron_parser() -> argparse.ArgumentParser:
    """A parser of the flags that Megatron-LM has: those of TransformerConfig, and those by hand."""
    config = pytest.importorskip("megatron.core.transformer").TransformerConfig
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    for flag, (name, read) in BY_HAND.items():
        add(parser, flag, name, read)
    taken = {name for name, _ in BY_HAND.values()}
    types_of = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        if field.name not in taken and not field.name.startswith("_"):
            told = field.metadata.get("argparse_meta", {})
            flag = told.get("arg_names", ["--" + field.name.replace("_", "-")])[0]
            add(parser, flag, field.name, reader(types_of[field.name]))
    return parser


def add(
    parser: argparse.ArgumentParser, flag: str, name: str, read: Callable[[str], Any] | None
) -> None:
    if read is None:
        parser.add_argument(flag, dest=name, action="store_true", default=argparse.SUPPRESS)
    else:
        parser.add_argument(flag, dest=name, type=read, default=argparse.SUPPRESS)


def reader(annotation: Any) -> Callable[[str], Any] | None:
    """How a field's text is read, by its type: a switch, one of a few words, or a value."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) is typing.Literal:
        return one_of(*typing.get_args(annotation))
    return {bool: None, int: int, float: float}.get(annotation, str)  # type: ignore[return-value]


def parsed(text: str) -> dict[str, Any]:
    """What Megatron would make of emitted arguments."""
    return vars(megatron_parser().parse_args(shlex.split(text, comments=True)))


SAID = (
    "gpt2", "gpt3-175b", "megatron-1t", "llama-2-7b", "llama-3-8b", "llama-3.1-405b", "llama-3.2-1b",
    "mistral-7b-v0.1", "mixtral-8x7b", "qwen2.5-7b", "qwen1.5-moe-a2.7b", "qwen3-14b", "qwen3-30b-a3b",
    "deepseek-v2-lite", "deepseek-v3", "starcoder2-7b", "smollm3-3b",
)  # fmt: skip
REFUSED = ("palm-540b", "gemma-2-9b", "gemma-3-4b", "bloom-176b", "opt-175b", "gpt-oss-20b", "deepseek-v2",
           "olmo-2-7b", "starcoder2-3b", "falcon-40b", "t5-3b", "llava-1.5-7b")  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_megatron_has_no_word_for_is_refused(name: str) -> None:
    assert list(unsaid_model(entry(name).arch, tp=1))


LAYOUTS = (
    Layout(tp=2, dp=4, zero=1, micro_batch=2),
    Layout(dp=8, zero=2),
    Layout(dp=8, cp=2, zero=3),
    Layout(pp=2, dp=2),
    Layout(pp=2, virtual=2),
    Layout(pp=5, virtual=2),
)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_megatron_knows_every_flag_of_a_layout(layout: Layout, recompute: str) -> None:
    arch = entry("megatron-1.7b").arch
    plan = planned(arch, layout, recompute=recompute, precision="fp8", global_batch=80)
    args = parsed(emitted("megatron", plan, learning_rate=3e-4))
    assert args["tensor_model_parallel_size"] == layout.tp
    assert args["context_parallel_size"] == layout.cp
    assert args["lr"] == 3e-4
    assert args["fp8"] == "hybrid"
    if "pipeline_model_parallel_layout" in args:
        config = config_of(args)  # which checks the layers of every stage
        assert config.virtual_pipeline_model_parallel_size == layout.virtual


def config_of(args: dict[str, Any]) -> Any:
    """TransformerConfig as Megatron-LM's core_transformer_config_from_args fills it."""
    import torch
    import torch.nn.functional as F
    from megatron.core.activations import squared_relu
    from megatron.core.fusions.fused_bias_geglu import quick_gelu
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    latent = "multi_latent_attention" in args
    kind = MLATransformerConfig if latent else TransformerConfig
    known = {field.name for field in dataclasses.fields(kind)}
    given = {name: value for name, value in args.items() if name in known}
    biased = not given.pop("add_bias_linear", False)  # the flag is --disable-bias-linear
    fused = biased and "no_bias_gelu_fusion" not in args
    given |= {"add_bias_linear": biased, "add_qkv_bias": biased or "add_qkv_bias" in args}
    if latent:
        given = {"q_lora_rank": None, "rotary_scaling_factor": 1.0, **given}
    if "swiglu" in args:
        given |= {"activation_func": F.silu, "gated_linear_unit": True}
    elif "squared_relu" in args:
        given |= {"activation_func": squared_relu, "bias_activation_fusion": fused}
    elif "quick_geglu" in args:
        given |= {"activation_func": quick_gelu, "gated_linear_unit": True}
    else:
        given |= {"bias_activation_fusion": fused}
    if "group_query_attention" not in args:
        given.pop("num_query_groups", None)
    return kind(**given, gradient_accumulation_fusion=False, pipeline_dtype=torch.bfloat16)


def padded(args: dict[str, Any]) -> int:
    multiple = args["make_vocab_size_divisible_by"] * args["tensor_model_parallel_size"]
    return -(-int(args["vocab_size"]) // multiple) * multiple


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """Megatron-Core wants process groups even for one process."""
    pytest.importorskip("megatron.core")
    import torch
    from megatron.core import parallel_state
    from torch.distributed import HashStore, destroy_process_group, init_process_group

    torch.set_num_threads(1)
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    destroy_process_group()


def built(arch: Arch, monkeypatch: pytest.MonkeyPatch) -> int:
    """Parameters of Megatron-Core's own modules, made of the emitted arguments alone."""
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer import multi_latent_attention

    args = parsed(emitted("megatron", planned(arch)))
    config = config_of(args)
    config.use_cpu_initialization = True
    config.perform_initialization = False
    config.moe_token_dispatcher_type = "allgather"  # the other one makes streams of a GPU
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    for layer in spec.layer_specs if config.multi_latent_attention else ():
        # Only Transformer Engine's attends to latents; none has weights.
        layer.submodules.self_attention.submodules.core_attention = torch.nn.Identity
    monkeypatch.setattr(multi_latent_attention, "TELinear", torch.nn.Identity)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "meta")
    with torch.device("meta"):
        model = GPTModel(
            config,
            spec,
            vocab_size=padded(args),
            max_sequence_length=args["max_position_embeddings"],
            position_embedding_type=args["position_embedding_type"],
            share_embeddings_and_output_weights="untie_embeddings_and_output_weights" not in args,
        )
    assert padded(args) == arch.embedding.n_rows
    return sum(weight.numel() for weight in model.parameters())


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("name", SAID)
def test_megatron_core_builds_the_model_that_was_planned(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch = shallow(entry(name).arch)
    assert built(arch, monkeypatch) == params(arch).value


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("everywhere", [True, False])
def test_megatron_core_has_biases_where_the_spec_has(
    everywhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch = shallow(entry("mixtral-8x7b").arch)
    layer = arch.layers[0]
    experts = layer.feed_forward
    assert isinstance(experts, Experts)
    biased = replace(
        layer,
        attention=replace(layer.attention, bias_qkv=True, bias_out=everywhere),
        feed_forward=replace(
            experts, expert=replace(experts.expert, bias=everywhere), router_bias=everywhere
        ),
    )
    arch = replace(arch, layers=(biased,) * arch.n_layers)
    assert built(arch, monkeypatch) == params(arch).value


# --- torchtitan ---------------------------------------------------------------------------------


def read_by_torchtitan(text: str) -> Any:
    """The configuration that torchtitan makes of an emitted command."""
    manager = pytest.importorskip("torchtitan.config.manager")
    words = shlex.split(text.replace("\\\n", ""), comments=True)
    return manager.ConfigManager().parse_args(words[words.index("torchtitan.train") + 1 :])


def for_flavour(flavour: Flavour) -> TrainPlan:
    precision = flavour.precision or "bf16"
    layout = Layout(dp=64, zero=3)
    arch = entry(flavour.model).arch
    return planned(arch, layout, precision=precision, recompute="full")


@pytest.mark.parametrize("flavour", FLAVOURS, ids=lambda f: f"{f.config}={f.model}")
def test_torchtitan_builds_the_model_that_was_planned(
    flavour: Flavour, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own modules have the spec's parameters, and its rotary table the length we know."""
    import torch

    if flavour.precision == EIGHT_BITS:
        pytest.importorskip("torchao")
        titan = pytest.importorskip("torchtitan.components.quantization.float8")
        monkeypatch.setattr(titan, "has_cuda_capability", lambda *_: True)  # parsing asks already
    plan = for_flavour(flavour)
    config = read_by_torchtitan(emitted("torchtitan", plan))
    model = config.model_spec.model
    with torch.device("meta"):
        built = sum(weight.numel() for weight in model.build().parameters())
    assert built == params(plan.ask.work.arch).value
    assert model.max_seq_len == flavour.longest
    assert len(model.layers) == plan.ask.work.arch.n_layers
    assert bool(flavour.differs) == differs(model, plan.ask.work.arch)


def differs(model: Any, arch: Arch) -> bool:
    """Whether norms have another epsilon, or rotary positions another scaling."""
    position = arch.layers[0].attention.position
    assert isinstance(position, Rope)
    assert arch.final_norm is not None
    scaling = {"llama": "llama3", "none": None}
    theirs = model.layers[0].attention.rope
    ours = None if position.scaling is None else position.scaling.kind
    same = theirs.theta == position.theta and scaling.get(theirs.scaling, theirs.scaling) == ours
    return not same or model.norm.eps != arch.final_norm.eps


@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp=8),
        Layout(tp=2, dp=4, cp=2, zero=3, cp_by="gather"),
        Layout(tp=2, pp=4, dp=4, zero=2, micro_batch=2, virtual=2),
        Layout(tp=2, dp=8, zero=2, sequence_parallel=False),
        Layout(pp=3, dp=8, zero=3),
    ],
    ids=str,
)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_torchtitan_reads_every_value_of_a_layout(layout: Layout, recompute: str) -> None:
    plan = planned(entry("llama-3.1-8b").arch, layout, recompute=recompute)
    config = read_by_torchtitan(emitted("torchtitan", plan, learning_rate=1.5e-4))
    ways, work = config.parallelism, config.training
    copies = (ways.data_parallel_replicate_degree, ways.data_parallel_shard_degree)
    assert copies == ((1, layout.dp) if layout.zero else (layout.dp, 1))
    assert ways.tensor_parallel_degree == layout.tp
    assert ways.context_parallel_degree == layout.cp
    assert ways.pipeline_parallel_degree == layout.pp
    assert ways.enable_sequence_parallel == layout.sequence_parallel
    assert ways.fsdp_reshard_after_forward == ("always" if layout.zero == 3 else "never")
    assert work.global_batch_size == plan.ask.global_batch
    assert work.seq_len == 1024
    assert work.mixed_precision_param == "bfloat16"
    assert config.optimizer.param_groups[0].optimizer_kwargs["lr"] == 1.5e-4
    again = config.activation_checkpoint
    assert again is None if recompute == "none" else "FullAC" in type(again).__qualname__
    if layout.pp > 1:
        assert ways.pipeline_parallel_microbatch_size == layout.micro_batch
        assert work.local_batch_size == plan.ask.global_batch // layout.dp
        stages = stages_of_torchtitan(config, layout)
        assert stages == layers_by_chunk(plan)


def stages_of_torchtitan(config: Any, layout: Layout) -> list[int]:
    """How many layers its pipeline gives each stage, by its own rule."""
    from torchtitan.distributed import pipeline_parallel as titan

    dims = types.SimpleNamespace(pp=layout.pp)
    found = titan._get_pipeline_metadata(dims, config.parallelism, config.model_spec.model)
    stages = titan._generate_llm_fqn_per_model_part(*found)
    return [sum(name.startswith("layers.") for name in stage) for stage in stages]


def test_torchtitan_deals_experts_without_graphs() -> None:
    plan = planned(entry("qwen3-30b-a3b").arch, Layout(dp=64, ep=8, zero=3))
    config = read_by_torchtitan(emitted("torchtitan", plan))
    assert config.parallelism.expert_parallel_degree == 8
    assert config.training.disable_cuda_graphs
