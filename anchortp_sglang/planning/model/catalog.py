"""From a HF config.json to the model that the planner plans for."""

from collections.abc import Iterator, Mapping
from typing import Any

from anchortp_sglang.planning.model import tensor_rules as rules
from anchortp_sglang.planning.model.architectures import ARCHITECTURES, Architecture, Experts
from anchortp_sglang.planning.model.axes import UnsupportedModel, positive_size
from anchortp_sglang.planning.model.checkpoint_index import check_index
from anchortp_sglang.planning.model.group_assembly import Dimensions, assemble
from anchortp_sglang.planning.model.model_sizes import read_dimensions
from anchortp_sglang.planning.model.plan_model import AxisGroup, MoeSplit, PlanModel
from anchortp_sglang.planning.model.tensor_rules import TensorRule
from anchortp_sglang.planning.model.weight_format import WeightFormat, read_weight_format

_PLANNED_LAYER_TYPES = {"full_attention", "sliding_attention"}


def read_plan_model(
    config: Mapping[str, Any],
    *,
    moe: MoeSplit = "tp",
    dtype: str | None = None,
    kv_element_bytes: int | None = None,
    index: Mapping[str, Any] | None = None,
) -> PlanModel:
    """The planner's model of a config.json.

    ``index`` is the content of model.safetensors.index.json, if there is one: then every tensor that the model
    needs must be in it, what is not served must be known, and whether the head is tied follows the checkpoint.
    KV is counted in ``kv_element_bytes`` per element, by default those of the model's dtype.
    Raises UnsupportedModel, naming the config field or the rule that is missing.
    """
    try:
        return _read(config, moe, dtype, kv_element_bytes, index)
    except UnsupportedModel:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # Fields are read where they are used; one of the wrong type shows there.
        raise UnsupportedModel(f"config.json: a field cannot be read ({type(error).__name__}: {error})") from error


def _read(
    config: Mapping[str, Any],
    moe: MoeSplit,
    dtype: str | None,
    kv_element_bytes: int | None,
    index: Mapping[str, Any] | None,
) -> PlanModel:
    name = _architecture_name(config)
    architecture = ARCHITECTURES[name]
    config = {**dict(architecture.defaults), **config}
    if other := sorted(set(config.get("layer_types") or ()) - _PLANNED_LAYER_TYPES):
        raise UnsupportedModel(f"layer_types: no rule for layers of type {', '.join(other)} in {name}")
    fmt = read_weight_format(config, dtype)
    if fmt.kind == "mxfp4" and not (architecture.experts and architecture.experts.stacked):
        raise UnsupportedModel(f"quantization_config.quant_method: no rule for mxfp4 in {name}")
    dims = read_dimensions(config, architecture, fmt, kv_element_bytes)
    num_layers = positive_size(config, "num_hidden_layers")
    tied = bool(config.get("tie_word_embeddings", False))
    if index is not None:
        tied = tied and "lm_head.weight" not in index.get("weight_map", {})
    groups = tuple(_groups(config, architecture, dims, fmt, moe, num_layers, tied))
    mtp = int(config.get(architecture.mtp) or 0) if architecture.mtp else 0
    left_out = tuple(f"model.layers.{num_layers + extra}" for extra in range(mtp))
    model = PlanModel(
        name, num_layers, fmt.dtype, fmt.kind, moe if architecture.experts else None, groups, left_out
    )  # fmt: skip
    if index is not None:
        check_index(model, index, same_dtype=dtype is None)
    return model


def _architecture_name(config: Mapping[str, Any]) -> str:
    if not isinstance(config, Mapping):
        raise UnsupportedModel(f"config.json must be an object, not {type(config).__name__}")
    names = config.get("architectures")
    if not isinstance(names, list | tuple) or not names:
        raise UnsupportedModel(f"architectures: config.json must name one, but has {names!r}")
    if names[0] not in ARCHITECTURES:
        raise UnsupportedModel(
            f"architectures: no rule for {names[0]}; planned for are {', '.join(sorted(ARCHITECTURES))}. A rule says "
            "how its attention, MLP and experts are named and cut"
        )
    return str(names[0])


def _groups(
    config: Mapping[str, Any],
    architecture: Architecture,
    dims: Dimensions,
    fmt: WeightFormat,
    moe: MoeSplit,
    num_layers: int,
    tied: bool,
) -> Iterator[AxisGroup]:
    attention = (*rules.NORMS, *_attention(config, architecture))
    dense = (*attention, *rules.gated_mlp(bias=_on(config, architecture.mlp_bias)))
    sparse = (*attention, *_sparse(config, architecture.experts, fmt, moe)) if architecture.experts else ()
    yield from assemble((rules.EMBED,), dims, fmt, scope="embed")
    for layer in range(num_layers):
        built = sparse if architecture.experts and _is_sparse(config, architecture.experts, layer) else dense
        yield from assemble(built, dims, fmt, scope=f"layers.{layer}", layer=layer, stage=layer + 1)
    yield from assemble((rules.FINAL_NORM,), dims, fmt, scope="norm", stage=num_layers + 1)
    if not tied:
        yield from assemble((rules.HEAD,), dims, fmt, scope="lm_head", stage=num_layers + 1)


def _on(config: Mapping[str, Any], switch: bool | str) -> bool:
    return bool(config.get(switch)) if isinstance(switch, str) else switch


def _attention(config: Mapping[str, Any], architecture: Architecture) -> tuple[TensorRule, ...]:
    if architecture.attention == "mla":
        return rules.latent_attention(q_lora=bool(config.get("q_lora_rank")))
    return rules.grouped_query_attention(
        qkv_bias=_on(config, architecture.qkv_bias),
        o_bias=_on(config, architecture.o_bias),
        qk_norm=_on(config, architecture.qk_norm),
        sinks=architecture.sinks,
    )


def _sparse(
    config: Mapping[str, Any], experts: Experts | None, fmt: WeightFormat, moe: MoeSplit
) -> tuple[TensorRule, ...]:
    assert experts is not None
    router = tuple(
        rules.replicated(
            experts.prefix + name,
            *(("experts", "hidden") if name.endswith("weight") else ("experts",)),
            element_bytes=4 if "correction" in name else None,
        )
        for name in experts.router
    )
    whole = moe == "ep"
    routed = (
        rules.stacked_experts(whole, fmt.kind == "mxfp4")
        if experts.stacked
        else rules.experts(experts.prefix, experts.names, whole)
    )
    has_shared = experts.shared and config.get(experts.shared)
    shared = rules.gated_mlp("mlp.shared_experts.", "shared_expert", "shared_inter") if has_shared else ()
    return (*router, *routed, *shared)


def _is_sparse(config: Mapping[str, Any], experts: Experts, layer: int) -> bool:
    if experts.layers == "first_k_dense":
        frequency = config.get("moe_layer_freq") or 1
        return layer >= (config.get("first_k_dense_replace") or 0) and layer % frequency == 0
    if experts.layers == "step":
        dense_ones = config.get("mlp_only_layers") or ()
        return layer not in dense_ones and (layer + 1) % (config.get("decoder_sparse_step") or 1) == 0
    return True
