"""The weights of pi0 and pi0.5 as hvd.models.acting wants them, made once when a checkpoint is loaded."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hvd.configs import ModelConfig
from hvd.models import gemma, int8
from hvd.models.lora import LoraConfig

type Tree = dict[str, Any]
_NORMS = ("pre_attention_norm", "pre_ffw_norm")
_MATRICES = ("qkv", "out", "gate_up", "up", "down")  # of a layer


def separate(cfg: ModelConfig, params: Tree, in_8_bits: bool = False) -> Tree:
    """The weights for acting.sample_actions; `params` loses its arrays part by part, so that memory does not double.

    Args:
        cfg: of the model.
        params: as hvd.models.pi0.Pi0's, nested and named as in checkpoints; layers are stacked.
        in_8_bits: the matrices of all layers and the table of word embeddings become hvd.models.int8.Quantised.

    Returns:
        The same tree but for PaliGemma: img {embedding, pos_embedding, layers, norm, head}; llm {embedding, trunk,
        expert, norm, modulation}. layers, trunk and expert hold one dict of weights a layer, in the model's dtype;
        the last one of `trunk` has what makes keys and values alone.
    """
    trunk = params.pop("PaliGemma")
    llm = trunk["llm"]
    layers = llm.pop("layers")
    table = llm.pop("embedder")["input_embedding"]
    table = jax.jit(partial(int8.quantised, axis=1))(table) if in_8_bits else table
    weights = params | {"PaliGemma": {"llm": {"embedding": table}}}
    ours = weights["PaliGemma"]
    layers_of = partial(_layers, jnp.dtype(cfg.dtype), in_8_bits)
    if "img" in trunk:
        img = trunk.pop("img")
        ours["img"] = {name: img[name] for name in ("embedding", "pos_embedding", "head")}
        ours["img"]["norm"] = img["Transformer"]["encoder_norm"]
        ours["img"]["layers"] = layers_of(_of_image, img["Transformer"].pop("encoderblock"))
    for i, name in enumerate(("trunk", "expert")):
        sizes = gemma.get_config((cfg.paligemma_variant, cfg.action_expert_variant)[i])
        attn = {key: layers["attn"].pop(key) for key in list(layers["attn"]) if gemma.expert_of((key,)) == i}
        norms = {f"norm_{n}": layers.pop(gemma.expert_name(key, i)) for n, key in enumerate(_NORMS)}
        final = llm.pop(gemma.expert_name("final_norm", i))
        adaptive = "scale" not in final
        if adaptive:
            ours["llm"]["modulation"] = {key: norm["Dense_0"] for key, norm in (norms | {"norm": final}).items()}
        elif name == "expert":
            ours["llm"]["norm"] = final["scale"]
        of_attention, of_mlp = partial(_of_attention, sizes, i), partial(_of_mlp, sizes)
        ours["llm"][name] = [
            a | m
            for a, m in zip(
                layers_of(of_attention, attn | ({} if adaptive else norms)),
                layers_of(of_mlp, layers.pop(gemma.expert_name("mlp", i))),
                strict=True,
            )
        ]
    # What the trunk's last layer makes of the prefix is not used, but for its keys and values
    last = ours["llm"]["trunk"][-1]
    queries = gemma.get_config(cfg.paligemma_variant).num_heads * gemma.get_config(cfg.paligemma_variant).head_dim
    ours["llm"]["trunk"][-1] = {"norm_0": last["norm_0"], "kv": jax.tree.map(lambda w: w[:, queries:], last["qkv"])}
    return weights


def _layers(dtype: jnp.dtype, in_8_bits: bool, make: Callable[[Tree], Tree], stacked: Tree) -> list[Tree]:
    """`make` of each layer of stacked parameters: matrices and biases in the model's dtype, norms as they are."""

    def kept(layer: Tree) -> Tree:
        layer = jax.tree_util.tree_map_with_path(cast, layer)
        narrow = {name: int8.quantised(layer[name]) for name in _MATRICES if in_8_bits and name in layer}
        return layer | narrow

    def cast(path: Any, leaf: Array) -> Array:
        return leaf if any("norm" in str(part) for part in path) else leaf.astype(dtype)

    def all_of(stacked: Tree) -> list[Tree]:
        depth = jax.tree.leaves(stacked)[0].shape[0]
        each = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(depth)]
        return [kept(make(layer)) for layer in each]

    return jax.jit(all_of)(stacked)


def _of_attention(sizes: gemma.Config, expert: int, layer: Tree) -> Tree:
    """qkv [width, (heads + 2 kv_heads) * head_dim], out [heads * head_dim, width], and the layer's plain norms."""

    def columns(name: str) -> Array:
        w = _with_update(layer[gemma.expert_name(name, expert)], sizes.lora)  # [..., heads, width, head_dim]
        return jnp.moveaxis(w.reshape(-1, *w.shape[-2:]), 1, 0).reshape(w.shape[-2], -1)

    fused = gemma.expert_name("qkv_einsum", expert) in layer
    names = ("qkv_einsum",) if fused else ("q_einsum", "kv_einsum")
    out = dict(layer[gemma.expert_name("attn_vec_einsum", expert)])
    if sizes.lora is not None:  # the heads are summed in both maps of the update (hvd.models.lora.Einsum)
        out["lora_b"] = jnp.broadcast_to(out["lora_b"].sum(axis=0), out["lora_b"].shape)
    made: Tree = {"qkv": jnp.concatenate([columns(name) for name in names], axis=1)}
    made["out"] = _with_update(out, sizes.lora).reshape(-1, out["w"].shape[-1])
    return made | {name: layer[name]["scale"] for name in ("norm_0", "norm_1") if name in layer}


def _with_update(einsum: Mapping[str, Array], lora: LoraConfig | None) -> Float[Array, "..."]:
    if lora is None:
        return einsum["w"]
    return einsum["w"] + lora.scale * _product(einsum["lora_a"], einsum["lora_b"])


def _product(a: Array, b: Array) -> Float[Array, "..."]:
    return jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")


def _of_mlp(sizes: gemma.Config, layer: Tree) -> Tree:
    """gate_up [width, 2 hidden], down [hidden, width]; the updates are added unscaled (hvd.models.lora.FeedForward)."""
    gating, down = layer["gating_einsum"], layer["linear"]
    if sizes.lora is not None:
        gating = gating + _product(layer["gating_einsum_lora_a"], layer["gating_einsum_lora_b"])
        down = down + _product(layer["linear_lora_a"], layer["linear_lora_b"])
    return {"gate_up": jnp.concatenate(list(gating), axis=1), "down": down}


def _of_image(layer: Tree) -> Tree:
    """qkv [width, 3 width], out, up, down with their biases, and both norms."""
    attention, mlp = layer["MultiHeadDotProductAttention_0"], layer["MlpBlock_0"]
    width = layer["LayerNorm_0"]["scale"].shape[0]
    three = [attention[name] for name in ("query", "key", "value")]
    return {
        "norm_0": layer["LayerNorm_0"],
        "norm_1": layer["LayerNorm_1"],
        "qkv": jnp.concatenate([p["kernel"].reshape(width, width) for p in three], axis=1),
        "qkv_bias": jnp.concatenate([p["bias"].reshape(width) for p in three]),
        "out": attention["out"]["kernel"].reshape(width, width),
        "out_bias": attention["out"]["bias"],
        "up": mlp["Dense_0"]["kernel"],
        "up_bias": mlp["Dense_0"]["bias"],
        "down": mlp["Dense_1"]["kernel"],
        "down_bias": mlp["Dense_1"]["bias"],
    }
