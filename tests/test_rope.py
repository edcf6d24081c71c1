"""data/rope.py and model/rope_reading.py against the models' own rotary modules, apply functions and stored keys.

No formula is compared with itself: the other side is what transformers computes, or complex numbers in float64.
"""

import copy
import logging
import pickle
import sys
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from streaming_llm.data.rope import Rope
from streaming_llm.model.rope_reading import (
    SUPPORTED_TYPES,
    check_rope,
    read_rotary,
    restore_frequencies,
    rope_at_length,
    rope_layers,
    rope_of_layer,
)

logging.getLogger("transformers").setLevel(logging.ERROR)

SHAPE = dict(
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=64,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
THETA = {"rope_theta": 10000.0}
TYPES = {
    "default": {"rope_type": "default", **THETA},
    "linear": {"rope_type": "linear", "factor": 4.0, **THETA},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, **THETA},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, **THETA},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        **THETA,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0 + i / 8 for i in range(8)],
        "long_factor": [2.0 + i for i in range(8)],
        "original_max_position_embeddings": 64,
        **THETA,
    },
}
HALF = {"partial_rotary_factor": 0.5}
PHI3_LONG = {**TYPES["longrope"], **HALF, "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
MOE = dict(num_local_experts=2, num_experts_per_tok=1)
GPT2 = dict(n_embd=64, n_head=4, n_layer=2, n_positions=256, num_hidden_layers=2)
# name: (model type, settings, expected rotary dimensions, expected neighbour pairs)
FAMILIES = {
    "llama": ("llama", {}, 16, False),
    "mistral": ("mistral", {}, 16, False),
    "mixtral": ("mixtral", MOE, 16, False),
    "qwen2": ("qwen2", {}, 16, False),
    "qwen3": ("qwen3", dict(head_dim=16), 16, False),
    "olmo2": ("olmo2", {}, 16, False),
    "falcon": ("falcon", dict(new_decoder_architecture=True, num_kv_heads=2), 16, False),
    "gemma2": ("gemma2", dict(head_dim=16), 16, False),
    "gpt_oss": ("gpt_oss", dict(head_dim=16, **MOE), 16, False),
    "phi3 partial": ("phi3", dict(rope_parameters={**TYPES["default"], **HALF}, **HALF), 8, False),
    "phi3 longrope": (
        "phi3",
        dict(rope_parameters=PHI3_LONG, original_max_position_embeddings=64, **HALF),
        8,
        False,
    ),
    "phimoe longrope": (  # its scaling, not its frequencies, changes with length
        "phimoe",
        dict(rope_parameters={**TYPES["longrope"], "short_mscale": 1.25, "long_mscale": 1.5}, **MOE),
        16,
        False,
    ),
    "gpt_neox partial": ("gpt_neox", {}, 4, False),
    "nemotron partial": ("nemotron", dict(head_dim=16), 8, False),
    "cohere": ("cohere", {}, 16, True),
    "ernie4_5": ("ernie4_5", dict(head_dim=16), 16, True),
    "helium": ("helium", dict(head_dim=16), 16, True),
    "glm partial": ("glm", dict(head_dim=16), 8, True),
    "nanochat, turning the other way": ("nanochat", {}, 16, False),
}
WITHOUT = {  # name: (model type, settings, layers that rotate)
    "smollm3": ("smollm3", {}, [True, True, True, False]),
    "smollm3 by list": ("smollm3", dict(no_rope_layers=[0, 1, 1, 0]), [False, True, True, False]),
    "cohere2": ("cohere2", dict(sliding_window=8), [True, True, True, False]),
    "exaone4": ("exaone4", dict(sliding_window=8, sliding_window_pattern=4), [True, True, True, False]),
    "exaone4 without windows": ("exaone4", dict(sliding_window=None, layer_types=["full_attention"] * 4), [True] * 4),
    "gpt2": ("gpt2", GPT2, [False] * 2),
    "opt": ("opt", dict(ffn_dim=64, word_embed_proj_dim=64), [False] * 4),
    "bloom": ("bloom", dict(n_head=4, n_layer=2, num_hidden_layers=2), [False] * 2),
    "falcon with ALiBi": ("falcon", dict(alibi=True, multi_query=False), [False] * 4),
}
REFUSED = {
    "gptj": (dict(rotary_dim=8, **GPT2), "no rotary module"),
    "llama4_text": (dict(intermediate_size_mlp=64, num_local_experts=2, head_dim=16), "Llama 4"),
    "qwen3_5_text": (dict(head_dim=16), "multimodal RoPE"),
    "deepseek_v3": (
        dict(n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=1, moe_intermediate_size=32)
        | dict(kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16),
        "multi-head latent attention",
    ),
}


def fresh_model(model_type, **kwargs):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **copy.deepcopy(SHAPE | kwargs))
        return AutoModelForCausalLM.from_config(config).eval()


@cache
def shared_model(name):
    """One model a name, for tests that do not change it."""
    if name in TYPES:
        return fresh_model("llama", rope_parameters=TYPES[name])
    model_type, kwargs, *_ = FAMILIES.get(name) or WITHOUT[name]
    return fresh_model(model_type, **kwargs)


@cache
def shared_rope(name):
    return rope_of_layer(shared_model(name))


def own_rotate(model, x, position_ids, layer_type=None):
    """`x` [batch, kv_heads, tokens, head_dim] at `[batch, tokens]` positions, by the model's own code."""
    rotary = copy.deepcopy(model.get_decoder().rotary_emb)
    cos, sin = rotary(x, position_ids, **({"layer_type": layer_type} if layer_type else {}))
    return sys.modules[type(rotary).__module__].apply_rotary_pos_emb(x, x, cos, sin)[1]


def stored_keys(model, position):
    """Each layer's key of one token alone, at `position`, as the model puts it in its cache."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.tensor([[5]]), position_ids=torch.tensor([[position]]), past_key_values=cache)
    return [layer.keys for layer in cache.layers]


def random_keys(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_within(ours, theirs, tolerance):
    """Equal within `tolerance` of the largest element."""
    error = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
    assert error <= tolerance, f"{error:.3g} > {tolerance:.3g}"


def exact_turn(rope, x, delta):
    """`x` turned by `delta` positions in float64, as complex numbers; scaling left alone."""
    angle = torch.as_tensor(delta, dtype=torch.float64)[..., None] * rope.inv_freq.double()
    rotary, rest = x[..., : rope.rotary_dim].double(), x[..., rope.rotary_dim :].double()
    pairs = rotary.unflatten(-1, (-1, 2)) if rope.interleaved else rotary.unflatten(-1, (2, -1)).transpose(-1, -2)
    turned = torch.complex(pairs[..., 0], pairs[..., 1]) * torch.polar(torch.ones_like(angle), angle)
    pairs = torch.view_as_real(turned)
    return torch.cat(((pairs if rope.interleaved else pairs.transpose(-1, -2)).flatten(-2), rest), dim=-1)


FP32 = 1e-6  # a few float32 roundings of a sum of two products

all_ropes = pytest.mark.parametrize("name", [*TYPES, *FAMILIES])


@all_ropes
def test_rotate_gives_what_the_models_own_functions_give(name):
    model, rope = shared_model(name), shared_rope(name)
    x = random_keys(2, 2, 32, 16)
    short = torch.stack((torch.arange(32), torch.arange(32, 64)))  # below every switch of frequencies
    assert_within(rope.rotate(x, short[:, None]), own_rotate(model, x, short), FP32)
    if rope.stable_length is None:
        for start in (8000, 5_000_000):
            far = start + torch.arange(64).view(2, 32)
            assert_within(rope.rotate(x, far[:, None]), own_rotate(model, x, far), FP32)


@all_ropes
def test_unrotate_undoes_the_models_own_rotation(name):
    model, rope = shared_model(name), shared_rope(name)
    x = random_keys(2, 2, 32, 16)
    for start in (0, 5_000_000) if rope.stable_length is None else (0,):
        positions = start + torch.arange(64).view(2, 32)
        assert_within(rope.unrotate(own_rotate(model, x, positions), positions[:, None]), x, 2 * FP32)


@all_ropes
def test_shift_and_move_take_the_models_own_keys_to_the_models_own_keys(name):
    model, rope = shared_model(name), shared_rope(name)
    x = random_keys(1, 2, 16, 16)
    start = torch.arange(16)[None]
    for delta in (1, 7, 40, 9000) if rope.stable_length is None else (1, 7, 40):
        before, after = own_rotate(model, x, start), own_rotate(model, x, start + delta)
        # The model's own angle is only as fine as float32 at that position; move knows it, shift can't.
        coarse = (16 + delta) * rope.inv_freq.abs().max().item() * 2**-23
        assert_within(rope.shift(before, delta), after, 2 * FP32 + coarse)
        assert_within(rope.shift(after, -delta), before, 2 * FP32 + coarse)
        assert_within(rope.move(before, start[:, None], start[:, None] + delta), after, 2 * FP32)
        assert_within(rope.move(after, start[:, None] + delta, start[:, None]), before, 2 * FP32)


@pytest.mark.parametrize("name", [*TYPES, *FAMILIES, *WITHOUT])
def test_keys_in_the_cache_of_a_whole_model_turn_as_each_layers_rope_says(name):
    model = shared_model(name)
    ropes = rope_layers(model)
    near, far = stored_keys(model, 3), stored_keys(model, 50)
    assert len(ropes) == len(near)
    learned = name in ("gpt2", "opt")  # positions added to the input: keys differ, but nothing turns
    for rope, a, b in zip(ropes, near, far, strict=True):
        if not learned:
            assert_within(rope.move(a, 3, 50), b, 2e-5)
            assert_within(rope.rotate(rope.unrotate(a, 3), 50), b, 2e-5)
            assert_within(rope.shift(a, 47), b, 2e-5)
        if learned or rope.rotates:
            assert not torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("name", TYPES)
def test_rope_type_is_read_and_scaling_is_the_modules(name):
    rope, rotary = shared_rope(name), shared_model(name).model.rotary_emb
    assert rope.rope_type == name and name in SUPPORTED_TYPES and rope.rotates
    assert rope.attention_scaling == pytest.approx(rotary.attention_scaling, rel=1e-7)
    assert (rope.attention_scaling != 1) == (name in ("yarn", "longrope"))
    assert rope.stable_length == {"dynamic": 255, "longrope": 64}.get(name)


@pytest.mark.parametrize("name", FAMILIES)
def test_pairing_and_rotary_dimension_are_found(name):
    _, _, rotary_dim, interleaved = FAMILIES[name]
    rope = shared_rope(name)
    assert (rope.rotary_dim, rope.interleaved) == (rotary_dim, interleaved)
    x = random_keys(1, 2, 4, 16)
    assert torch.equal(rope.rotate(x, 9)[..., rotary_dim:], x[..., rotary_dim:])


@pytest.mark.parametrize("name", WITHOUT)
def test_layers_without_rope_are_found(name):
    ropes = rope_layers(shared_model(name))
    assert [rope.rotates for rope in ropes] == WITHOUT[name][2]
    static = rope_layers(shared_model(name), check=False)
    assert list(static) == list(ropes)
    x = random_keys(1, 2, 4, 16)
    for rope in ropes:
        if not rope.rotates:
            assert rope.rope_type == "none" and rope == Rope.none() and rope_at_length(rope, 10**6) is rope
            for same in (rope.rotate(x, 9), rope.unrotate(x, 9), rope.move(x, 3, 9), rope.shift(x, 9)):
                assert torch.equal(same, x)


def test_gemma3_local_and_global_layers_have_their_own_frequencies():
    parameters = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
    }
    model = fresh_model("gemma3_text", head_dim=16, num_hidden_layers=7, rope_parameters=parameters)
    ropes = rope_layers(model)
    assert [rope.rope_type for rope in ropes] == ["default"] * 5 + ["linear", "default"]
    assert ropes[0] is ropes[6] and ropes[0] != ropes[5]
    x, positions = random_keys(1, 2, 32, 16), torch.arange(32)[None]
    for rope, layer_type in ((ropes[0], "sliding_attention"), (ropes[5], "full_attention")):
        assert_within(rope.rotate(x, positions[:, None]), own_rotate(model, x, positions, layer_type), FP32)
    for rope, near, far in zip(ropes, stored_keys(model, 3), stored_keys(model, 90), strict=True):
        assert_within(rope.move(near, 3, 90), far, 2e-5)
    with pytest.raises(ValueError, match="layer_idx=None.*layers of this model differ"):
        rope_of_layer(model)
    assert rope_of_layer(model, 5) == ropes[5]
    with pytest.raises(ValueError, match="layer_idx=7: allowed are 0 to 6"):
        rope_of_layer(model, 7)
    with pytest.raises(ValueError, match="layer_type='no_such'.*full_attention, sliding_attention"):
        read_rotary(model.model.rotary_emb, layer_type="no_such")


@pytest.mark.parametrize("layer_type, index", [("sliding_attention", 0), ("full_attention", 5)])
@pytest.mark.parametrize("rope_type, stable_length", [("longrope", 64), ("dynamic", 255)])
def test_types_that_depend_on_length_are_handled_for_each_layer_type(rope_type, stable_length, layer_type, index):
    parameters = dict.fromkeys(("sliding_attention", "full_attention"), TYPES["default"])
    parameters = {**parameters, layer_type: TYPES[rope_type]}
    model = fresh_model("gemma3_text", head_dim=16, num_hidden_layers=7, rope_parameters=parameters)
    ropes = rope_layers(model)
    assert ropes[index].stable_length == stable_length and ropes[5 - index].stable_length is None
    x = random_keys(1, 1, 300, 16)
    for length in (stable_length, 300):
        if rope_type == "dynamic":  # transformers 5.2 fails in the second long forward of a longrope layer type
            with torch.inference_mode():  # the model itself, so that a stretched state stays in its module
                model.model.rotary_emb(x, torch.arange(300)[None], layer_type)
            restore_frequencies(model)
        positions = torch.arange(length)[None]
        theirs = own_rotate(model, x[:, :, :length], positions, layer_type)
        assert_within(rope_at_length(ropes[index], length).rotate(x[:, :, :length], positions[:, None]), theirs, FP32)
    assert rope_layers(model) == ropes


@pytest.mark.parametrize("name", ["dynamic", "longrope", "phi3 longrope", "phimoe longrope"])
def test_frequencies_are_the_models_own_up_to_stable_length_and_change_past_it(name):
    model, rope = shared_model(name), shared_rope(name)
    x = random_keys(1, 1, 400, 16)

    def error(which, length):
        positions = torch.arange(length)
        theirs = own_rotate(model, x[:, :, :length], positions[None])
        return (which.rotate(x[:, :, :length], positions) - theirs).abs().max().item()

    assert error(rope, rope.stable_length) < 1e-5
    past = rope.stable_length + 2  # dynamic: + 1 is the trained length, which only a module that never saw more keeps
    assert error(rope, past) > 1e-3
    for length in (past, 300, 400):
        assert error(rope_at_length(rope, length), length) < 1e-5
    assert rope_at_length(rope, rope.stable_length) is rope
    with pytest.raises(ValueError, match="length=0"):
        rope_at_length(rope, 0)


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_keys_stored_under_long_frequencies_can_be_brought_to_the_short_ones(name):
    model, rope = shared_model(name), shared_rope(name)
    x, positions = random_keys(1, 2, 300, 16), torch.arange(300)
    long = rope_at_length(rope, 300)
    stored = own_rotate(model, x, positions[None])
    short = rope.rotate(long.unrotate(stored, positions), positions)[:, :, :32]
    assert_within(short, own_rotate(model, x[:, :, :32], positions[None, :32]), 3 * FP32)


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_a_long_forward_before_does_not_change_what_is_read(name):
    model = fresh_model("llama", rope_parameters=TYPES[name])
    before = rope_of_layer(model)
    with torch.inference_mode():
        model(input_ids=torch.full((1, 300), 5))
    assert rope_of_layer(model) == before == shared_rope(name)
    with torch.inference_mode():
        model(input_ids=torch.full((1, 300), 5))
    assert rope_of_layer(model, check=False) == before
    with torch.inference_mode():
        model(input_ids=torch.full((1, 400), 5))
        assert rope_of_layer(model, check=False) == before
    restore_frequencies(model)
    x = random_keys(1, 1, 256, 16)
    for length in (60, 256) if name == "dynamic" else (60,):  # 256 is the trained length
        positions = torch.arange(length)
        theirs = own_rotate(model, x[:, :, :length], positions[None])
        assert_within(before.rotate(x[:, :, :length], positions), theirs, FP32)
    check_rope(model, [before] * 4)
    # and the module still stretches when it has to
    positions = torch.arange(300)[None]
    x = random_keys(1, 1, 300, 16)
    assert_within(rope_at_length(before, 300).rotate(x, positions[:, None]), own_rotate(model, x, positions), FP32)


def test_restoring_leaves_other_types_alone():
    model = shared_model("yarn")
    buffer = model.model.rotary_emb.inv_freq
    restore_frequencies(model)
    assert model.model.rotary_emb.inv_freq is buffer
    restore_frequencies(shared_model("gpt2"))


def test_reading_a_model_changes_nothing_in_it():
    for name in ("dynamic", "longrope", "yarn", "smollm3"):
        model = fresh_model("llama", rope_parameters=TYPES[name]) if name in TYPES else fresh_model("smollm3")
        model.train()
        model.model.layers[1].eval()
        rotary = model.model.rotary_emb
        buffers = {key: value.clone() for key, value in rotary.named_buffers()}
        modes = [module.training for module in model.modules()]
        seed = torch.random.get_rng_state()
        rope_layers(model)
        assert modes == [module.training for module in model.modules()]
        assert torch.equal(seed, torch.random.get_rng_state())
        assert rotary.max_seq_len_cached == 256
        for key, copied in buffers.items():
            assert torch.equal(getattr(rotary, key), copied)


def test_a_model_in_training_with_dropout_can_be_checked():
    model = fresh_model("gpt_neox", hidden_dropout=0.5).train()
    assert all(rope == shared_rope("gpt_neox partial") for rope in rope_layers(model))


@pytest.mark.parametrize("name", ["llama", "gpt_neox partial", "cohere", "yarn", "longrope"])
def test_a_model_cast_to_bfloat16_is_read_as_it_computes(name):
    model = copy.deepcopy(shared_model(name)).to(torch.bfloat16)
    ropes = rope_layers(model)
    x, positions = random_keys(1, 2, 32, 16), torch.arange(32)[None]
    assert_within(ropes[0].rotate(x, positions[:, None]), own_rotate(model, x, positions), FP32)


def test_hooks_on_the_rotary_module_are_not_run_and_stay():
    hooks = pytest.importorskip("accelerate.hooks")
    model = fresh_model("llama", rope_parameters=TYPES["longrope"])
    calls = []

    class Hook(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    hooks.add_hook_to_module(model.model.rotary_emb, Hook())
    assert read_rotary(model.model.rotary_emb) == shared_rope("longrope")
    assert not calls
    rope_layers(model)
    assert calls and all(module is model.model.rotary_emb for module in calls)


@pytest.mark.parametrize("model_type", REFUSED)
def test_unsupported_rope_is_refused_by_name(model_type):
    kwargs, reason = REFUSED[model_type]
    model = fresh_model(model_type, **kwargs)
    with pytest.raises(ValueError, match=f"{reason}.*; supported: rope_type default, linear"):
        rope_layers(model)


def test_an_unknown_rope_type_is_refused_by_name():
    rotary = copy.deepcopy(shared_model("llama").model.rotary_emb)
    rotary.rope_type = "spiral"
    with pytest.raises(ValueError, match="rope_type 'spiral' of LlamaRotaryEmbedding is not supported; supported:"):
        read_rotary(rotary)


def test_a_module_that_computes_something_else_is_refused(monkeypatch):
    rotary = copy.deepcopy(shared_model("llama").model.rotary_emb)
    module = sys.modules[type(rotary).__module__]
    own = type(rotary).forward
    with monkeypatch.context() as patch:
        patch.setattr(type(rotary), "forward", lambda self, x, p: own(self, x, p * 2))
        with pytest.raises(ValueError, match="does not turn vectors as position times inv_freq"):
            read_rotary(rotary)
    with monkeypatch.context() as patch:
        patch.setattr(module, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q, k * cos + k.roll(1, -1) * sin))
        with pytest.raises(ValueError, match="does not turn vectors as position times inv_freq"):
            read_rotary(rotary)
    with monkeypatch.context() as patch:
        patch.delattr(module, "apply_rotary_pos_emb")
        with pytest.raises(ValueError, match="without apply_rotary_pos_emb"):
            read_rotary(rotary)
    read_rotary(rotary)


def test_keys_that_are_changed_after_rotation_are_refused():
    # HunYuan normalises keys after rotating them; with weights that differ between dimensions they no longer turn.
    model = fresh_model("hunyuan_v1_dense", head_dim=16)
    with torch.no_grad():
        model.model.layers[2].self_attn.key_layernorm.weight.copy_(torch.linspace(0.5, 2, 16))
    with pytest.raises(ValueError, match="model type 'hunyuan_v1_dense', layer 2: its keys don't turn"):
        rope_layers(model)


def test_check_refuses_ropes_that_are_not_the_models():
    model = shared_model("smollm3")
    ropes = list(rope_layers(model))
    for wrong in (Rope.none(), rope_of_layer(shared_model("linear")), rope_of_layer(shared_model("cohere"))):
        with pytest.raises(ValueError, match="'smollm3', layer 1: its keys don't turn"):
            check_rope(model, [ropes[0], wrong, *ropes[2:]])
    with pytest.raises(ValueError, match="layer 3"):
        check_rope(model, ropes[:3] + ropes[:1])
    with pytest.raises(ValueError, match="ropes has 3 entries: model type 'smollm3' has 4 layers"):
        check_rope(model, ropes[:3])


def test_what_is_no_loaded_model_is_refused():
    with pytest.raises(ValueError, match="model=Linear: allowed are transformers models"):
        rope_layers(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="rotary=Linear: allowed are modules with inv_freq"):
        read_rotary(torch.nn.Linear(2, 2))
    with torch.device("meta"):
        model = fresh_model("gpt2", **GPT2)
    with pytest.raises(ValueError, match="meta device"):
        rope_layers(model)
    assert not rope_of_layer(model, check=False).rotates


positions_and_deltas = given(
    name=st.sampled_from(["llama", "yarn", "longrope", "glm partial", "cohere", "gpt_neox partial"]),
    p=st.lists(st.integers(0, 8192), min_size=3, max_size=3),
    a=st.integers(-4096, 4096),
    b=st.floats(-4096, 4096, width=32),
    seed=st.integers(0, 100),
)


@settings(max_examples=60, deadline=None)
@positions_and_deltas
def test_shifts_form_a_group(name, p, a, b, seed):
    rope, x = shared_rope(name), random_keys(1, 2, 3, 16, seed=seed)
    x = rope.rotate(x, torch.tensor(p))
    assert torch.equal(rope.shift(x, 0), x)
    assert_within(rope.shift(rope.shift(x, a), -a), x, 3 * FP32)
    assert_within(rope.shift(rope.shift(x, a), b), rope.shift(x, a + b), 3 * FP32)
    assert_within(rope.shift(rope.shift(x, a), b), rope.shift(rope.shift(x, b), a), 3 * FP32)


@settings(max_examples=60, deadline=None)
@positions_and_deltas
def test_moves_compose_and_rotate_is_a_move_of_rotate(name, p, a, b, seed):
    rope, x = shared_rope(name), random_keys(1, 2, 3, 16, seed=seed)
    p, q, r = torch.tensor(p), torch.tensor(p) + a, torch.tensor(p, dtype=torch.float64) + b
    start = rope.rotate(x, p)
    assert_within(rope.move(start, p, p), start, 2 * FP32)
    assert_within(rope.move(start, p, q), rope.rotate(x, q), 2 * FP32)
    assert_within(rope.move(rope.move(start, p, r), r, q), rope.rotate(x, q), 3 * FP32)
    assert_within(rope.unrotate(rope.move(start, p, r), r), x, 3 * FP32)


@settings(max_examples=60, deadline=None)
@positions_and_deltas
def test_attention_depends_on_differences_of_positions_only(name, p, a, b, seed):
    rope, q, k = shared_rope(name), random_keys(1, 2, 3, 16, seed=seed), random_keys(1, 2, 3, 16, seed=seed + 1000)
    q, k = rope.rotate(q, p[0]), rope.rotate(k, torch.tensor(p))
    scores = q @ k.mT
    scale = q.norm(dim=-1).max() * k.norm(dim=-1).max()
    for delta in (a, b, 5_000_000):
        assert ((rope.shift(q, delta) @ rope.shift(k, delta).mT - scores).abs().max() / scale) < 3 * FP32


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(["llama", "yarn", "glm partial"]), delta=st.integers(-(2**40), 2**40))
def test_shift_is_exact_for_deltas_of_any_size(name, delta):
    rope, x = shared_rope(name), random_keys(1, 2, 3, 16)
    assert_within(rope.shift(x, delta), exact_turn(rope, x, delta), 2 * FP32 + abs(delta) * 2**-52)
    assert_within(rope.shift(x.double(), delta), exact_turn(rope, x, delta), abs(delta) * 2**-51 + 1e-14)


@pytest.mark.parametrize("name", ["yarn", "glm partial"])
@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_thousands_of_shifts_from_the_last_exact_state_drift_by_one_rounding(name, count):
    rope = shared_rope(name)
    exact = random_keys(1, 2, 16, 16, dtype=torch.bfloat16)
    position = 9000 + torch.arange(16)
    generator = torch.Generator().manual_seed(1)
    start, naive, total = position, exact, torch.zeros(16, dtype=torch.float64)
    for _ in range(count):
        delta = torch.randint(-64, 65, (16,), generator=generator)
        position, total = position + delta, total + delta
        naive = rope.shift(naive, delta)
    true = exact_turn(rope, exact, total)
    half_ulp = 2.0 ** (torch.frexp(true.abs()).exponent - 9)  # bfloat16 keeps 8 bits
    for now in (rope.shift(exact, total), rope.move(exact, start, position)):
        assert now.dtype == torch.bfloat16
        # move follows the model's angles, whose float32 rounding at 9,000 is finer than bfloat16's
        assert ((now.double() - true).abs() <= half_ulp * 1.001 + 2e-3).all()
    assert ((rope.shift(exact, total).double() - true).abs() <= half_ulp * 1.001 + 1e-6).all()
    # what the advice is for: shifting each result again does drift
    assert ((naive.double() - true).abs() > 4 * half_ulp).double().mean() > 0.2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_is_worked_on_precisely_and_returned(dtype):
    rope = shared_rope("yarn")
    x = random_keys(2, 2, 5, 16, dtype=dtype)
    tolerance = max(torch.finfo(dtype).eps, 1e-7 if dtype != torch.float64 else 0)
    positions = torch.arange(5) * 11
    assert_within(rope.shift(x, positions), exact_turn(rope, x, positions), 2 * tolerance)
    rotated = rope.rotate(x, positions)
    assert rotated.dtype == rope.unrotate(x, 3).dtype == rope.move(x, 3, 4).dtype == rope.shift(x, 3).dtype == dtype
    assert_within(rotated, rope.rotate(x.double(), positions), 2 * tolerance)
    assert_within(rope.unrotate(rotated, positions), x, 4 * tolerance)


def test_positions_broadcast_and_each_key_gets_its_own():
    rope = shared_rope("gpt_neox partial")
    x = random_keys(2, 3, 5, 16)
    positions = torch.randint(0, 100, (2, 3, 5), generator=torch.Generator().manual_seed(0))
    together = rope.rotate(x, positions), rope.move(x, positions, positions + 7), rope.shift(x, positions)
    for b in range(2):
        for h in range(3):
            for t in range(5):
                one, p = x[b, h, t : t + 1], positions[b, h, t].item()
                alone = rope.rotate(one, p), rope.move(one, p, p + 7), rope.shift(one, p)
                for many, single in zip(together, alone, strict=True):
                    assert_within(many[b, h, t : t + 1], single, FP32)
    for given_, full in (
        (torch.tensor(4), torch.full((2, 3, 5), 4)),
        (torch.arange(5), torch.arange(5).expand(2, 3, 5)),
        (positions[:, :1], positions[:, :1].expand(2, 3, 5)),
        (positions[:1, :, :1].double() + 0.5, (positions[:1, :, :1].double() + 0.5).expand(2, 3, 5)),
    ):
        for method in (rope.rotate, rope.unrotate, rope.shift):
            assert torch.equal(method(x, given_), method(x, full))
        assert torch.equal(rope.move(x, given_, 9), rope.move(x, full, 9))
    assert rope.rotate(x[:, :, :0], positions[:, :, :0]).shape == (2, 3, 0, 16)


def test_wrong_arguments_are_refused_by_name():
    rope = shared_rope("llama")
    x = random_keys(2, 2, 5, 16)
    for bad in (torch.zeros(2, 5), torch.zeros(4), torch.zeros(2, 2, 4), torch.zeros(3, 2, 5), torch.zeros(1, 2, 2, 5)):
        with pytest.raises(ValueError, match=r"positions has shape \[.*allowed for x of shape \[2, 2, 5, 16\]"):
            rope.rotate(x, bad)
        with pytest.raises(ValueError, match="delta has shape"):
            rope.shift(x, bad)
        with pytest.raises(ValueError, match="positions has shape"):
            rope.move(x, 0, bad)
    for dtype in (torch.bfloat16, torch.float16, torch.bool):
        with pytest.raises(ValueError, match="positions has dtype torch..*allowed are integers, float32 and float64"):
            rope.unrotate(x, torch.ones(5, dtype=dtype))
    with pytest.raises(ValueError, match="x has dtype torch.int64"):
        rope.rotate(x.long(), 1)
    with pytest.raises(ValueError, match="x has head_dim 8; this RoPE needs 16 or more"):
        rope.rotate(x[..., :8], 1)


def test_a_rope_compares_copies_and_pickles():
    rope, other = shared_rope("longrope"), shared_rope("dynamic")
    assert rope != other and rope != "rope" and len({rope, rope_of_layer(shared_model("longrope")), other}) == 2
    x = random_keys(1, 1, 3, 16)
    for twin in (copy.deepcopy(rope), pickle.loads(pickle.dumps(rope))):
        assert twin == rope and rope_at_length(twin, 100) == rope_at_length(rope, 100) != rope
        assert torch.equal(twin.rotate(x, 5), rope.rotate(x, 5))
    assert "longrope" in repr(rope) and "tensor" not in repr(rope)


@pytest.mark.parametrize("device", ["cpu", "meta"])  # meta: a device that inv_freq has to be copied to
def test_gradients_pass_also_after_first_use_in_inference_mode(device):
    with torch.inference_mode():
        rope = rope_of_layer(shared_model("llama"))
        rope.shift(random_keys(1, 1, 2, 16).to(device), 3)
    x = random_keys(1, 1, 2, 16).to(device).requires_grad_()
    positions = torch.tensor([1.0, 2.0], device=device, requires_grad=True)
    result = rope.rotate(rope.shift(x, 3), positions)
    result.sum().backward()
    assert result.device.type == device and positions.grad.shape == (2,) and x.grad.shape == x.shape
    if device == "cpu":
        assert x.grad.abs().sum() > 0 and positions.grad.abs().sum() > 0
