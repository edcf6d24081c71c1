"""Models of several parts around a supported text model: what README says works is tried, images and audio included."""

from __future__ import annotations

import pytest
import torch
import transformers
from conftest import token_ids
from test_families import LLAMA_LIKE

from streaming_llm import disable_adms_llm, enable_adms_llm
from streaming_llm.model.enable import is_enabled

SMALL = {"start_size": 2, "recent_size": 16, "compressed_budget": 12, "compression_interval": 8, "rank": 8}
PART = 127  # the token in whose place a part of the image or of the sound comes
SIDE = 16  # pixels of an image

VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE,
          "patch_size": 8}  # fmt: skip
AUDIO = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "num_mel_bins": 8,
         "max_source_positions": 8}  # fmt: skip
TEXT = {**LLAMA_LIKE, "num_hidden_layers": 2}
GEMMA = {**TEXT, "head_dim": 8, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
IMAGE = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
SIZES = {"image_sizes": torch.tensor([[SIDE, SIDE]])}
# model type: (class name, other part, its config class and settings, text config class and settings, settings, inputs,
# tokens they take).
COMPOSITES = {
    "aya_vision": ("AyaVision", "vision", "SiglipVisionConfig", {**VISION, "vision_use_head": False}, "Cohere2Config", GEMMA,
                   {"image_token_index": PART, "downsample_factor": 2, "vision_feature_layer": -1},
                   {"pixel_values": IMAGE}, 1),
    "cohere2_vision": ("Cohere2Vision", "vision", "SiglipVisionConfig", {**VISION, "vision_use_head": False},
                       "Cohere2Config", GEMMA,
                       {"image_token_id": PART, "downsample_factor": 2, "alignment_intermediate_size": 32},
                       {"pixel_values": IMAGE}, 1),
    "gemma3": ("Gemma3", "vision", "SiglipVisionConfig", {**VISION, "vision_use_head": False}, "Gemma3TextConfig", GEMMA,
               {"image_token_index": PART, "mm_tokens_per_image": 4}, {"pixel_values": IMAGE}, 4),
    "idefics3": ("Idefics3", "vision", "Idefics3VisionConfig", VISION, "LlamaConfig", TEXT,
                 {"image_token_id": PART, "scale_factor": 1, "pad_token_id": 0}, {"pixel_values": IMAGE[None]}, 4),
    "internvl": ("InternVL", "vision", "InternVLVisionConfig", {**VISION, "image_size": [SIDE, SIDE], "patch_size": [4, 4]},
                 "Qwen2Config", TEXT, {"image_token_id": PART, "downsample_ratio": 0.5}, {"pixel_values": IMAGE}, 4),
    "llava": ("Llava", "vision", "CLIPVisionConfig", VISION, "LlamaConfig", TEXT, {"image_token_index": PART},
              {"pixel_values": IMAGE}, 4),
    "llava_next": ("LlavaNext", "vision", "CLIPVisionConfig", VISION, "MistralConfig", {**TEXT, "sliding_window": None},
                   {"image_token_index": PART, "image_grid_pinpoints": [[SIDE, SIDE]], "vision_feature_layer": -1},
                   {"pixel_values": torch.stack([IMAGE, IMAGE], dim=1), **SIZES}, 10),
    "llava_onevision": ("LlavaOnevision", "vision", "SiglipVisionConfig", VISION, "Qwen2Config", TEXT,
                        {"image_token_index": PART, "image_grid_pinpoints": [[SIDE, SIDE]], "vision_feature_layer": -1},
                        {"pixel_values": torch.stack([IMAGE, IMAGE], dim=1), **SIZES}, 10),
    "mistral3": ("Mistral3", "vision", "PixtralVisionConfig", {**VISION, "head_dim": 8}, "MistralConfig",
                 {**TEXT, "head_dim": 8, "sliding_window": None},
                 {"image_token_index": PART, "spatial_merge_size": 1, "vision_feature_layer": -1},
                 {"pixel_values": IMAGE, **SIZES}, 4),
    "paligemma": ("PaliGemma", "vision", "SiglipVisionConfig", {**VISION, "projection_dim": 32}, "Gemma2Config", GEMMA,
                  {"image_token_index": PART, "projection_dim": 32, "hidden_size": 32}, {"pixel_values": IMAGE}, 4),
    "qwen2_audio": ("Qwen2Audio", "audio", "Qwen2AudioEncoderConfig", AUDIO, "Qwen2Config", TEXT,
                    {"audio_token_index": PART},
                    {"input_features": IMAGE[0, :1, :8], "feature_attention_mask": torch.ones(1, 16).long()}, 4),
    "smolvlm": ("SmolVLM", "vision", "SmolVLMVisionConfig", VISION, "LlamaConfig", TEXT,
                {"image_token_id": PART, "scale_factor": 1, "pad_token_id": 0}, {"pixel_values": IMAGE[None]}, 4),
    "vipllava": ("VipLlava", "vision", "CLIPVisionConfig", {**VISION, "num_hidden_layers": 3}, "LlamaConfig", TEXT,
                 {"image_token_index": PART, "vision_feature_layers": [-1, -1]}, {"pixel_values": IMAGE}, 4),
    "voxtral": ("Voxtral", "audio", "VoxtralEncoderConfig",
                {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
                 "num_mel_bins": 8, "max_source_positions": 8},
                "LlamaConfig", TEXT, {"audio_token_id": PART}, {"input_features": IMAGE[0, :1, :8]}, 2),
}  # fmt: skip


def composite_types(part: str) -> str:
    """The model types that are tried here, whose other part is of that kind, as README lists them."""
    return ", ".join(f"`{name}`" for name, parts in COMPOSITES.items() if parts[1] == part)


def make(name: str):
    """`(model, inputs, tokens)`: a tiny random model with an image or a sound, and how many tokens that takes."""
    prefix, part, kind, settings, text_kind, text, own, inputs, tokens = COMPOSITES[name]
    if not hasattr(transformers, f"{prefix}ForConditionalGeneration"):
        pytest.skip(f"this transformers has no {prefix}")
    other = settings if kind is None else getattr(transformers, kind)(**settings)
    text = getattr(transformers, text_kind)(**text)
    config = getattr(transformers, f"{prefix}Config")(**{f"{part}_config": other, "text_config": text}, **own)
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config).eval()
    for parameter in model.parameters():
        # Some projections of what is seen begin at zero.
        if not parameter.any() and parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    torch.random.set_rng_state(state)
    model.generation_config.eos_token_id = None
    return model, inputs, tokens


def implementations(model) -> list:
    return [(module.config, module.config._attn_implementation) for module in model.modules() if hasattr(module, "config")]


def text_with(tokens: int, batch: int = 1) -> torch.Tensor:
    ids = token_ids(30, batch, vocab_size=PART)
    ids[:, 10 : 10 + tokens] = PART
    return ids


@pytest.mark.parametrize("name", COMPOSITES)
def test_images_and_sounds_are_tokens_of_the_stream(name):
    model, inputs, tokens = make(name)
    before, ids = implementations(model), text_with(tokens)
    given = {"attention_mask": torch.ones_like(ids), "do_sample": False, **inputs}
    expected = model.generate(ids, **given, max_new_tokens=6)
    cache = enable_adms_llm(model, rank=8)
    assert torch.equal(model.generate(ids, **given, max_new_tokens=6, past_key_values=cache), expected)
    assert cache.get_seq_length() == 35
    cache = enable_adms_llm(model, **SMALL)
    assert model.generate(ids, **given, max_new_tokens=40, past_key_values=cache).shape[1] == 70
    assert cache.held_tokens <= cache.config.expected_max_tokens and cache.stats["total_compressions"] > 0
    other = enable_adms_llm(model, **SMALL)
    model.generate(ids, **{**given, **{key: -value for key, value in inputs.items() if value.is_floating_point()}},
                   max_new_tokens=40, past_key_values=other)  # fmt: skip
    assert not torch.equal(cache.layers[1].held.values, other.layers[1].held.values)
    disable_adms_llm(model)
    assert all(one is two and name == named for (one, name), (two, named) in
               zip(before, implementations(model), strict=True))  # fmt: skip
    assert torch.equal(model.generate(ids, **given, max_new_tokens=6), expected)


@pytest.mark.parametrize("name", ["llava", "paligemma", "qwen2_audio"])
def test_a_padded_row_with_an_image_says_what_it_says_alone(name):
    model, inputs, tokens = make(name)
    ids = text_with(tokens, 2)
    mask = torch.ones_like(ids)
    mask[0, :6] = ids[0, :6] = 0

    def said(rows: slice, start: int) -> torch.Tensor:
        given = {key: torch.cat([value, value])[rows] for key, value in inputs.items()}
        return model.generate(
            ids[rows, start:], attention_mask=mask[rows, start:], **given, max_new_tokens=30, do_sample=False,
            past_key_values=enable_adms_llm(model, **SMALL),
        )  # fmt: skip

    both = said(slice(0, 2), 0)
    assert torch.equal(both[:1, 6:], said(slice(0, 1), 6)) and torch.equal(both[1:], said(slice(1, 2), 0))


@pytest.mark.parametrize("text", ["eager", "sdpa"])
def test_each_part_keeps_the_implementation_it_has(text):
    model, inputs, tokens = make("llava")
    model.set_attn_implementation({"": "sdpa", "vision_config": "eager", "text_config": text})
    before, ids = implementations(model), text_with(tokens)
    given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 30, **inputs}
    expected = model.generate(ids, **given, past_key_values=enable_adms_llm(model, **SMALL))
    assert [model.config._attn_implementation, model.config.vision_config._attn_implementation,
            model.config.text_config._attn_implementation] == ["sdpa", "eager", text]  # fmt: skip
    # Another for one part, while enabled.
    model.set_attn_implementation({"vision_config": "sdpa"})
    assert model.config.text_config._attn_implementation == text
    model.set_attn_implementation({"vision_config": "eager"})
    assert torch.equal(model.generate(ids, **given, past_key_values=enable_adms_llm(model, **SMALL)), expected)
    disable_adms_llm(model)
    assert all(one is two and name == named for (one, name), (two, named) in
               zip(before, implementations(model), strict=True))  # fmt: skip


def test_a_model_whose_text_part_can_not_be_is_refused_with_nothing_left():
    model, *_ = make("llava")
    model.config.text_config._attn_implementation_internal = "flex_attention"
    before = implementations(model)
    with pytest.raises(ValueError, match="flex_attention"):
        enable_adms_llm(model)
    assert not is_enabled(model)
    assert all(one is two and name == named for (one, name), (two, named) in
               zip(before, implementations(model), strict=True))  # fmt: skip
