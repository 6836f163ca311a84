"""Vision models and two towers equal transformers: states, features, scores, maps, pictures of other sizes, folders."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from published import TINY, label, oracle, output, saved
from torch import Tensor, nn

import headway
from headway import families, quantize
from headway.heads import HeadSpec, pool

try:  # transformers imports it wherever it is installed; no model needs it
    import torchvision  # noqa: F401
except (ImportError, RuntimeError):  # it is missing, or built for another PyTorch
    sys.modules["torchvision"] = None  # type: ignore[assignment]

CLOSE = 3e-5
KINDS = {case: families.read(families.family(case[0]).tiny()[case[1]], "x").spec["kind"] for case in TINY}
VISION = [case for case, kind in KINDS.items() if kind == "vision"]
DUAL = [case for case, kind in KINDS.items() if kind == "dual"]
CLIP, TEXT, IMAGE = ("clip", 0), ("clip", 3), ("clip", 5)
INTERPOLATED = [case for case in VISION if case[0] == "dinov2"]
Case = tuple[str, int]


def close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    apart = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1))
    assert apart < CLOSE, apart


def pictures(model: Any, rows: int = 3, size: tuple[int, int] | None = None) -> Tensor:
    made = model.spec["towers"]["image"]["patches"] if model.kind == "dual" else model.spec["patches"]
    torch.manual_seed(2)
    return torch.randn(rows, made["channels"], *(size or made["image"]))


def words(model: Any) -> tuple[Tensor, Tensor]:
    """Texts of three lengths, each with the end where a tokenizer puts it."""
    spec = model.spec["towers"]["text"]
    head = spec["heads"]["project"]
    torch.manual_seed(1)
    lengths = torch.tensor([12, 5, 8])
    valid = torch.arange(12) < lengths[:, None]
    ids = torch.randint(5, spec["vocab"] - 1, (3, 12)).where(valid, model.facts.pad)
    ids[torch.arange(3), lengths - 1] = head.get("end", spec["vocab"] - 1)
    return ids, valid


@torch.no_grad()
def maps(net: Any, *inputs: Any) -> list[Tensor]:
    """The attention maps of every block, of the inputs that it had."""
    heard: list[tuple[nn.Module, Tensor, dict[str, Any]]] = []
    hooks = [block.mixer.inner.register_forward_pre_hook(lambda m, x, more: heard.append((m, x[0], more)),
                                                         with_kwargs=True) for block in net.stack.blocks]  # fmt: skip
    net(*inputs)
    for hook in hooks:
        hook.remove()
    return [mixer.map(x, mask=more["mask"], pos=more["pos"]) for mixer, x, more in heard]


# --- equal to transformers


@pytest.mark.parametrize("case", VISION, ids=label)
def test_states_logits_and_maps_of_pictures_equal_transformers(case: Case) -> None:
    theirs, ours = oracle(case), headway.load(saved(case))
    pixels = pictures(ours)
    with torch.no_grad():
        said = theirs(pixels, output_attentions=True)
        close(ours.hidden(pixels), theirs.base_model(pixels).last_hidden_state)
    close(ours.logits(pixels), output(said))
    found = maps(ours.net, pixels)
    assert len(found) == len(said.attentions) == 3
    for mine, wanted in zip(found, said.attentions, strict=True):
        close(mine, wanted)


@pytest.mark.parametrize("size", [(14, 14), (42, 42), (21, 56), (7, 112)])
@pytest.mark.parametrize("case", INTERPOLATED, ids=label)
def test_pictures_of_other_sizes_equal_transformers(case: Case, size: tuple[int, int]) -> None:
    theirs, ours = oracle(case), headway.load(saved(case))
    pixels = pictures(ours, size=size)
    with torch.no_grad():
        close(ours.hidden(pixels), theirs.base_model(pixels).last_hidden_state)
        close(ours.logits(pixels), output(theirs(pixels)))


@pytest.mark.parametrize("case", [("dinov2", 0), ("dinov2", 3)], ids=label)
def test_hidden_patches_equal_transformers(case: Case) -> None:
    theirs, ours = oracle(case), headway.load(saved(case))
    pixels, hidden = pictures(ours), torch.arange(48).view(3, 16) % 3 == 0
    with torch.no_grad():
        close(ours.net(pixels, hidden), theirs(pixels, bool_masked_pos=hidden).last_hidden_state)
    with pytest.raises(ValueError, match="no token stands for what is hidden"):
        headway.load(saved(("dinov2", 1))).net(pixels, hidden)


@pytest.mark.parametrize("case", [case for case in VISION if case not in INTERPOLATED], ids=label)
def test_pictures_of_other_sizes_are_refused_where_positions_are_not_stretched(case: Case) -> None:
    ours = headway.load(saved(case))
    with pytest.raises(ValueError, match=r"40 x 32 pixels, and the positions are for .*: resize them"):
        ours.hidden(pictures(ours, size=(40, 32)))


@pytest.mark.parametrize("case", DUAL, ids=label)
def test_both_towers_and_their_scores_equal_transformers(case: Case) -> None:
    theirs, ours = oracle(case), headway.load(saved(case))
    (ids, valid), pixels, net = words(ours), pictures(ours, 4), ours.net
    with torch.no_grad():
        said = theirs(ids, pixels, attention_mask=valid.long(), output_attentions=True)
        text, image = net.project("text", ids, valid), net.project("image", pixels)
        close(net.towers["text"](ids, valid)[valid], said.text_model_output.last_hidden_state[valid])
        close(net.towers["image"](pixels), said.vision_model_output.last_hidden_state)
        close(text, said.text_embeds)
        close(image, said.image_embeds)
        close(net.scores(text, image), said.logits_per_text)
        close(net.scores(image, text), said.logits_per_image)
    for mine, wanted in zip(maps(net.towers["image"], pixels), said.vision_model_output.attentions, strict=True):
        close(mine, wanted)
    there = valid[:, None, :, None]  # what padding sees means nothing
    for mine, wanted in zip(maps(net.towers["text"], ids, valid), said.text_model_output.attentions, strict=True):
        close(mine * there, wanted * there)


def test_padding_changes_no_text_s_vector() -> None:
    ours = headway.load(saved(CLIP))
    ids, valid = words(ours)
    with torch.no_grad():
        batched = ours.net.project("text", ids, valid)
        for row, length in enumerate(valid.sum(1)):
            close(batched[row : row + 1], ours.net.project("text", ids[row : row + 1, :length]))


# --- what is read, and what is not

VIT = {"attention_probs_dropout_prob": 0.0, "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "hidden_size": 768,
       "image_size": 224, "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-12,
       "num_attention_heads": 12, "num_channels": 3, "num_hidden_layers": 12, "patch_size": 16, "qkv_bias": True,
       "id2label": {str(i): f"class {i}" for i in range(1000)}, "transformers_version": "4.13.0.dev0"}  # fmt: skip
DINOV2 = {"apply_layernorm": True, "architectures": ["Dinov2Model"], "attention_probs_dropout_prob": 0.0,
          "drop_path_rate": 0.0, "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "hidden_size": 768,
          "image_size": 518, "initializer_range": 0.02, "layer_norm_eps": 1e-6, "layerscale_value": 1.0, "mlp_ratio": 4,
          "model_type": "dinov2", "num_attention_heads": 12, "num_channels": 3, "num_hidden_layers": 12,
          "out_features": ["stage12"], "out_indices": [12], "patch_size": 14, "qkv_bias": True,
          "reshape_hidden_states": True, "stage_names": ["stem"], "torch_dtype": "float32",
          "use_swiglu_ffn": False}  # fmt: skip
OLD = {"_name_or_path": "", "add_cross_attention": False, "architectures": None, "attention_dropout": 0.0,
       "bad_words_ids": None, "bos_token_id": 0, "chunk_size_feed_forward": 0, "cross_attention_hidden_size": None,
       "decoder_start_token_id": None, "diversity_penalty": 0.0, "do_sample": False, "dropout": 0.0,
       "early_stopping": False, "encoder_no_repeat_ngram_size": 0, "eos_token_id": 2, "finetuning_task": None,
       "forced_bos_token_id": None, "hidden_act": "quick_gelu", "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
       "initializer_factor": 1.0, "initializer_range": 0.02, "is_decoder": False, "is_encoder_decoder": False,
       "layer_norm_eps": 1e-5, "length_penalty": 1.0, "max_length": 20, "min_length": 0, "no_repeat_ngram_size": 0,
       "num_beam_groups": 1, "num_beams": 1, "num_hidden_layers": 12, "num_return_sequences": 1,
       "output_attentions": False, "output_scores": False, "pad_token_id": 1, "prefix": None, "pruned_heads": {},
       "remove_invalid_values": False, "repetition_penalty": 1.0, "return_dict": True, "temperature": 1.0,
       "tie_encoder_decoder": False, "tie_word_embeddings": True, "top_k": 50, "top_p": 1.0, "torchscript": False,
       "typical_p": 1.0, "use_bfloat16": False}  # fmt: skip
KNOWN: dict[str, tuple[dict[str, Any], int]] = {
    "vit-base-patch16-224": ({**VIT, "architectures": ["ViTForImageClassification"], "model_type": "vit"}, 86_567_656),
    "deit-base-distilled": ({**VIT, "architectures": ["DeiTForImageClassificationWithTeacher"],
                             "model_type": "deit"}, 87_338_192),
    "dinov2-base": (DINOV2, 86_580_480),
    "dinov2-giant": ({**DINOV2, "hidden_size": 1536, "num_attention_heads": 24, "num_hidden_layers": 40,
                      "use_swiglu_ffn": True}, 1_136_480_768),
    "clip-vit-base-patch32": (
        {"architectures": ["CLIPModel"], "initializer_factor": 1.0, "logit_scale_init_value": 2.6592,
         "model_type": "clip", "projection_dim": 512, "torch_dtype": "float32", "transformers_version": None,
         "text_config": {**OLD, "hidden_size": 512, "intermediate_size": 2048, "max_position_embeddings": 77,
                         "model_type": "clip_text_model", "num_attention_heads": 8, "vocab_size": 49408},
         "text_config_dict": None,
         "vision_config": {**OLD, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "hidden_size": 768,
                           "image_size": 224, "intermediate_size": 3072, "model_type": "clip_vision_model",
                           "num_attention_heads": 12, "patch_size": 32},
         "vision_config_dict": None}, 151_277_313),
}  # fmt: skip


@pytest.mark.parametrize("case", [("vit", 5), ("dinov2", 4), CLIP], ids=label)
def test_packed_weights_give_the_same(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = headway.load(saved(case))
    monkeypatch.setattr(quantize, "WORTH", 1)

    def said() -> Tensor:
        if ours.kind == "vision":
            return ours.logits(pictures(ours))
        with torch.no_grad():
            return ours.net.scores(ours.net.project("text", *words(ours)), ours.net.project("image", pictures(ours)))

    before = said()
    quantize.prepare(ours.net)
    assert quantize.is_prepared(ours.net)
    close(said(), before)


def test_two_towers_have_no_hidden_states_of_their_own() -> None:
    ours = headway.load(saved(CLIP))
    for call in (ours.hidden, ours.logits):
        with pytest.raises(ValueError, match=r"two towers \(text, image\), each with states of its own"):
            call(words(ours)[0])


def test_a_text_without_its_end_is_refused() -> None:
    ours = headway.load(saved(TEXT))
    with pytest.raises(ValueError, match=r"row 1 has no end \(id 98\), where this head reads"):
        ours.logits(torch.tensor([[5, 98], [5, 6]]))


def test_old_files_are_read_where_their_text_is_largest() -> None:
    x, ids = torch.arange(12.0).view(2, 3, 2), torch.tensor([[3, 9, 1], [8, 2, 2]])
    assert torch.equal(pool(x, HeadSpec(pool="largest"), ids, None), x[torch.arange(2), torch.tensor([1, 0])])
    found = families.read(families.family("clip").tiny()[1], "x")
    assert found.spec["towers"]["text"]["heads"]["project"]["pool"] == "largest"


def test_where_an_old_clip_tells_a_tower_twice_the_second_telling_counts() -> None:
    config = {**families.family("clip").tiny()[0]}
    config["text_config_dict"] = {**config["text_config"], "num_hidden_layers": 2, "hidden_act": "relu"}
    import transformers

    theirs = transformers.CLIPConfig(**{name: value for name, value in config.items() if name != "model_type"})
    text = families.read(config, "x").spec["towers"]["text"]
    assert text["stack"]["repeat"] == theirs.text_config.num_hidden_layers == 2
    assert text["stack"]["blocks"][0]["feedforward"]["activation"] == theirs.text_config.hidden_act == "relu"


@pytest.mark.parametrize(
    ("case", "change", "reason"),
    [
        (("vit", 0), {"architectures": ["ViTForMaskedImageModeling"]}, "ViTForMaskedImageModeling is not read; there"),
        (("vit", 0), {"architectures": ["ViTForImageClassificationWithTeacher"]}, "is not read; there is ViTModel, V"),
        (("vit", 0), {"pooler_output_size": 16}, "'pooler_output_size' is 16, which changes the result"),
        (("vit", 0), {"patch_size": [8, 4]}, "patch_size is 8 x 4; Headway's patches are squares"),
        (("vit", 0), {"image_size": [8, 8, 8]}, "'image_size' is [8, 8, 8], and should be a size in pixels"),
        (("dinov2", 0), {"architectures": ["Dinov2Backbone"]}, "architecture Dinov2Backbone is not read; there is"),
        (("dinov2", 0), {"image_size": [28, 14]}, "image_size is (28, 14); DINOv2's positions are those of a square"),
        (CLIP, {"architectures": ["CLIPForImageClassification"]}, "CLIPForImageClassification is not read; there is"),
        (CLIP, {"logit_scale_init_value": 1e9}, "logit_scale_init_value is 1000000000.0; a logarithm"),
        (CLIP, {"text_config": {"is_decoder": True}}, "text_config: 'is_decoder' is True, which changes the result"),
        (CLIP, {"vision_config": {"qk_norm": True}}, "vision_config: 'qk_norm' (True) is a field that Headway does no"),
    ],
)
def test_what_is_not_read_is_refused_by_name(case: Case, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError) as fault:
        families.read({**families.family(case[0]).tiny()[case[1]], **change}, "config.json")
    assert reason in str(fault.value) and "\n" not in str(fault.value)


def test_a_new_head_on_a_vision_model_is_named(tmp_path: Path) -> None:
    model = headway.load(saved(("vit", 0)), heads={"classify": {"pool": "first", "outputs": 5}})
    assert model.logits(pictures(model)).shape == (3, 5)
    model.save(tmp_path / "new", format="transformers")
    assert json.loads((tmp_path / "new" / "config.json").read_text())["architectures"] == ["ViTForImageClassification"]


def test_a_head_of_two_tokens_averages_what_each_says() -> None:
    with pytest.raises(ValueError, match="averages their outputs: say how many"):
        HeadSpec(pool="first_two")


# --- folders with a processor


def folder(case: Case, to: Path, tokenizer: bool = False) -> tuple[Path, Any]:
    """A tiny checkpoint with the processor of its pictures, and a tokenizer where it reads texts."""
    import transformers
    from vocabularies import clip

    config = families.family(case[0]).tiny()[case[1]]
    made: dict[str, Any] = config.get("vision_config", config)
    side = {"height": made["image_size"], "width": made["image_size"]}
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": made["image_size"] + 2}, crop_size=side)
    theirs = oracle(case)
    if tokenizer:
        (to / "draft").mkdir(parents=True)
        words = clip(to / "draft")
        config = {**config, "text_config": {**config["text_config"], "vocab_size": len(words),
                                            "eos_token_id": words.eos_token_id, "bos_token_id": words.bos_token_id,
                                            "pad_token_id": words.pad_token_id}}  # fmt: skip
        torch.manual_seed(3)
        theirs = transformers.CLIPModel(transformers.CLIPConfig(**config)).eval()
        for parameter in theirs.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.2)
        words.save_pretrained(to / "m")
    theirs.save_pretrained(to / "m")
    processor.save_pretrained(to / "m")
    return to / "m", (theirs, processor, words if tokenizer else None)


def photos() -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), np.uint8)
    return [Image.fromarray(one).resize((50, 41)) for one in noise]


@pytest.mark.parametrize("format", ["transformers", "headway"])
@pytest.mark.parametrize("case", [("vit", 2 + 2), ("dinov2", 0), IMAGE], ids=label)
def test_a_processor_comes_along_and_is_written_back(case: Case, format: str, tmp_path: Path) -> None:
    from headway.image import pixels

    where, (_, processor, _) = folder(case, tmp_path)
    model = headway.load(where)
    wanted = torch.from_numpy(np.stack(processor(photos())["pixel_values"]))
    model.save(tmp_path / "back", format=format)  # type: ignore[arg-type]
    for one in (model, headway.load(tmp_path / "back")):
        assert one.image is not None
        assert torch.equal(pixels(photos(), one.image), wanted)
    if format == "transformers":
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        again = CLIPImageProcessorPil.from_pretrained(tmp_path / "back")
        assert torch.equal(torch.from_numpy(np.stack(again(photos())["pixel_values"])), wanted)


@torch.no_grad()
def test_a_clip_folder_reads_texts_and_pictures_and_tells_them_apart_as_transformers_does(tmp_path: Path) -> None:
    where, (theirs, processor, tokenizer) = folder(CLIP, tmp_path, tokenizer=True)
    labels = ["cat", "tree by a house", "dog"]
    texts = [f"a photo of a {name}" for name in labels]
    given = tokenizer(texts, return_tensors="pt", padding=True)
    seen = torch.from_numpy(np.stack(processor(photos())["pixel_values"]))
    said = theirs(given["input_ids"], seen, attention_mask=given["attention_mask"])
    shares = said.logits_per_image.softmax(-1)
    headway.load(where).save(tmp_path / "back", format="transformers")
    for model in (headway.load(where), headway.load(tmp_path / "back")):
        assert model.image is not None and model.tokenizer is not None
        inputs = model.inputs(texts)
        assert torch.equal(inputs.ids, given["input_ids"])
        close(model.embed(texts), said.text_embeds)
        close(model.embed(photos()), said.image_embeds)
        for found, row in zip(model.classify(photos(), labels), shares, strict=True):
            assert found.label == labels[int(row.argmax())]
            close(torch.tensor([found.probabilities[name] for name in labels]), row)
