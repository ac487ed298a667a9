"""Small vision towers for `tiny_wrappers`: the names and shapes of their tensors, as in the released models."""

from anchortp_sglang.testing.tiny_layers import Sizes, Tensors

WIDTH, INNER, BLOCKS, HEADS = 32, 64, 2, 4
"""Widths, depth and heads of every vision tower."""


def _biased(name: str, rows: int, *inner: int) -> Tensors:
    yield f"{name}.weight", (rows, *inner)
    yield f"{name}.bias", (rows,)


def siglip(sizes: Sizes) -> Tensors:
    tower = "vision_tower.vision_model"
    yield from _biased(f"{tower}.embeddings.patch_embedding", WIDTH, 3, 14, 14)
    yield f"{tower}.embeddings.position_embedding.weight", (16, WIDTH)
    for block in range(BLOCKS):
        name = f"{tower}.encoder.layers.{block}"
        yield from _biased(f"{name}.layer_norm1", WIDTH)
        yield from _biased(f"{name}.layer_norm2", WIDTH)
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _biased(f"{name}.self_attn.{projection}", WIDTH, WIDTH)
        yield from _biased(f"{name}.mlp.fc1", INNER, WIDTH)
        yield from _biased(f"{name}.mlp.fc2", WIDTH, INNER)
    yield from _biased(f"{tower}.post_layernorm", WIDTH)
    yield "multi_modal_projector.mm_input_projection_weight", (WIDTH, sizes.hidden_size)
    yield "multi_modal_projector.mm_soft_emb_norm.weight", (WIDTH,)


def gemma4_tower(sizes: Sizes) -> Tensors:
    tower = "model.vision_tower"
    yield f"{tower}.patch_embedder.position_embedding_table", (2, 16, WIDTH)
    yield f"{tower}.patch_embedder.input_proj.weight", (WIDTH, 3 * 14 * 14)
    for block in range(BLOCKS):
        name = f"{tower}.encoder.layers.{block}"
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{name}.self_attn.{projection}.linear.weight", (WIDTH, WIDTH)
        for one in ("q_norm", "k_norm"):
            yield f"{name}.self_attn.{one}.weight", (WIDTH // HEADS,)
        for projection in ("gate_proj", "up_proj"):
            yield f"{name}.mlp.{projection}.linear.weight", (INNER, WIDTH)
        yield f"{name}.mlp.down_proj.linear.weight", (WIDTH, INNER)
        for one in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            yield f"{name}.{one}_layernorm.weight", (WIDTH,)
    yield "model.embed_vision.embedding_projection.weight", (sizes.hidden_size, WIDTH)


def pixtral(sizes: Sizes) -> Tensors:
    yield "vision_tower.patch_conv.weight", (WIDTH, 3, 14, 14)
    yield "vision_tower.ln_pre.weight", (WIDTH,)
    for block in range(BLOCKS):
        name = f"vision_tower.transformer.layers.{block}"
        yield f"{name}.attention_norm.weight", (WIDTH,)
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{name}.attention.{projection}.weight", (WIDTH, WIDTH)
        yield f"{name}.ffn_norm.weight", (WIDTH,)
        for projection in ("gate_proj", "up_proj"):
            yield f"{name}.feed_forward.{projection}.weight", (INNER, WIDTH)
        yield f"{name}.feed_forward.down_proj.weight", (WIDTH, INNER)
    yield "multi_modal_projector.norm.weight", (WIDTH,)
    yield "multi_modal_projector.patch_merger.merging_layer.weight", (WIDTH, 4 * WIDTH)
    yield "multi_modal_projector.linear_1.weight", (sizes.hidden_size, WIDTH)
    yield "multi_modal_projector.linear_2.weight", (sizes.hidden_size, sizes.hidden_size)


def qwen25_tower(sizes: Sizes) -> Tensors:
    yield "visual.patch_embed.proj.weight", (WIDTH, 3, 2, 14, 14)
    for block in range(BLOCKS):
        name = f"visual.blocks.{block}"
        yield f"{name}.norm1.weight", (WIDTH,)
        yield f"{name}.norm2.weight", (WIDTH,)
        yield from _biased(f"{name}.attn.qkv", 3 * WIDTH, WIDTH)
        yield from _biased(f"{name}.attn.proj", WIDTH, WIDTH)
        yield from _biased(f"{name}.mlp.gate_proj", INNER, WIDTH)
        yield from _biased(f"{name}.mlp.up_proj", INNER, WIDTH)
        yield from _biased(f"{name}.mlp.down_proj", WIDTH, INNER)
    yield "visual.merger.ln_q.weight", (WIDTH,)
    yield from _biased("visual.merger.mlp.0", 4 * WIDTH, 4 * WIDTH)
    yield from _biased("visual.merger.mlp.2", sizes.hidden_size, 4 * WIDTH)


def qwen3_tower(sizes: Sizes) -> Tensors:
    def merger(name: str, norm: int) -> Tensors:
        yield from _biased(f"{name}.norm", norm)
        yield from _biased(f"{name}.linear_fc1", 4 * WIDTH, 4 * WIDTH)
        yield from _biased(f"{name}.linear_fc2", sizes.hidden_size, 4 * WIDTH)

    yield from _biased("model.visual.patch_embed.proj", WIDTH, 3, 2, 16, 16)
    yield "model.visual.pos_embed.weight", (64, WIDTH)
    for block in range(BLOCKS):
        name = f"model.visual.blocks.{block}"
        yield from _biased(f"{name}.norm1", WIDTH)
        yield from _biased(f"{name}.norm2", WIDTH)
        yield from _biased(f"{name}.attn.qkv", 3 * WIDTH, WIDTH)
        yield from _biased(f"{name}.attn.proj", WIDTH, WIDTH)
        yield from _biased(f"{name}.mlp.linear_fc1", INNER, WIDTH)
        yield from _biased(f"{name}.mlp.linear_fc2", WIDTH, INNER)
    yield from merger("model.visual.merger", WIDTH)
    yield from merger("model.visual.deepstack_merger_list.0", 4 * WIDTH)
