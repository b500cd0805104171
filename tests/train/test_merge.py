from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor

import lorainit
from lorainit import LoraInitError
from lorainit.tasks import get_task
from lorainit.train.evaluate import evaluate
from lorainit.train.merge import merge_folder
from lorainit.train.model import load_base
from lorainit.train.run import train
from runs import recipe, save_tiny_bert, save_tiny_vit, small

TINY: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
}
T5 = transformers.T5Config(
    vocab_size=40, d_model=16, d_ff=32, d_kv=8, num_heads=2, num_layers=2, decoder_start_token_id=0
)
VIT = transformers.ViTConfig(**TINY, image_size=8, patch_size=4, num_labels=5)
WHISPER = transformers.WhisperConfig(
    vocab_size=40,
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=32,
    decoder_ffn_dim=32,
    num_mel_bins=8,
    max_source_positions=20,
    max_target_positions=20,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
)
WAV2VEC2 = transformers.Wav2Vec2Config(
    **TINY,
    conv_dim=(8, 8),
    conv_kernel=(4, 2),
    conv_stride=(2, 2),
    num_feat_extract_layers=2,
    num_conv_pos_embeddings=4,
)
IDS = torch.arange(3, 9)[None]
TEXT = {"input_ids": IDS}
PAIR = {"input_ids": IDS, "decoder_input_ids": IDS}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)}
SPEECH = {"input_features": torch.linspace(-1, 1, 320).reshape(1, 8, 40), "decoder_input_ids": IDS}
SOUND = {"input_values": torch.linspace(-1, 1, 200)[None]}


@dataclasses.dataclass(frozen=True)
class Case:
    """A base as it lies on disk, the class that gets the adapter, and what PEFT is told of it."""

    base: str
    config: Any
    adapted: str
    task_type: str | None
    inputs: dict[str, Tensor]
    labels: int | None = None
    head: str | None = None  # trained in full; PEFT finds it by itself where it knows the task type


CASES = {
    "causal LM": Case("LlamaForCausalLM", transformers.LlamaConfig(**TINY), "LlamaForCausalLM", "CAUSAL_LM", TEXT),
    "seq2seq": Case("T5ForConditionalGeneration", T5, "T5ForConditionalGeneration", "SEQ_2_SEQ_LM", PAIR),
    "sequence classifier": Case(
        "BertModel", transformers.BertConfig(**TINY), "BertForSequenceClassification", "SEQ_CLS", TEXT, labels=3
    ),
    "classifier with a head of two layers": Case(
        "RobertaForMaskedLM",
        transformers.RobertaConfig(**TINY),
        "RobertaForSequenceClassification",
        "SEQ_CLS",
        TEXT,
        labels=4,
    ),
    "causal LM as a classifier": Case(
        "LlamaForCausalLM",
        transformers.LlamaConfig(**TINY, pad_token_id=0),
        "LlamaForSequenceClassification",
        "SEQ_CLS",
        TEXT,
        labels=3,
    ),
    "token classifier": Case(
        "BertForMaskedLM",
        transformers.BertConfig(**TINY),
        "BertForTokenClassification",
        "TOKEN_CLS",
        TEXT,
        labels=5,
        head="classifier",
    ),
    "question answering": Case(
        "BertForQuestionAnswering",
        transformers.BertConfig(**TINY),
        "BertForQuestionAnswering",
        "QUESTION_ANS",
        TEXT,
        head="qa_outputs",
    ),
    "features": Case("BertModel", transformers.BertConfig(**TINY), "BertModel", "FEATURE_EXTRACTION", TEXT),
    "image classifier": Case(
        "ViTForImageClassification",
        VIT,
        "ViTForImageClassification",
        None,
        PIXELS,
        labels=3,
        head="classifier",
    ),
    "audio classifier": Case(
        "Wav2Vec2ForSequenceClassification",
        WAV2VEC2,
        "Wav2Vec2ForSequenceClassification",
        "SEQ_CLS",
        SOUND,
    ),
    "speech to text": Case(
        "WhisperForConditionalGeneration", WHISPER, "WhisperForConditionalGeneration", "SEQ_2_SEQ_LM", SPEECH
    ),
    "masked LM without a task": Case("BertForMaskedLM", transformers.BertConfig(**TINY), "BertForMaskedLM", None, TEXT),
    "encoder without a task": Case("BertModel", transformers.BertConfig(**TINY), "BertModel", None, TEXT),
}


def save_adapted(case: Case, folder: Path) -> Any:
    """Save a base and an adapter with weights of its own on it; return the adapted model."""
    torch.manual_seed(0)
    getattr(transformers, case.base)(case.config).save_pretrained(folder / "base")
    labels = {} if case.labels is None else {"num_labels": case.labels, "ignore_mismatched_sizes": True}
    model = getattr(transformers, case.adapted).from_pretrained(folder / "base", **labels)
    kinds = {"task_type": case.task_type, "modules_to_save": [case.head] if case.head else None}
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", exclude_modules=case.head, **kinds))
    lorainit.initialize(adapted, "gaussian", progress=False)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    adapted.save_pretrained(str(folder / "adapter"))
    return adapted.eval().get_base_model()  # PEFT's own forward of a task type does not take every input


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def outputs(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.mark.filterwarnings("ignore:.*no tokenizer or processor")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_merged_model_is_of_the_class_that_the_adapter_was_made_for(case, tmp_path) -> None:
    adapted = save_adapted(case, tmp_path)
    merge_folder(str(tmp_path / "adapter"), str(tmp_path / "merged"))
    merged_class = getattr(transformers, case.adapted)
    merged, info = merged_class.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert merged.config.architectures == [case.adapted]
    assert not info["missing_keys"] and not info["mismatched_keys"]
    expected = outputs(adapted, case.inputs)
    torch.testing.assert_close(outputs(merged.eval(), case.inputs), expected, rtol=1e-4, atol=1e-5)
    for layer in adapted.modules():
        if isinstance(layer, LoraLayer):
            layer.enable_adapters(False)
    assert not torch.allclose(outputs(adapted, case.inputs), expected, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*no tokenizer or processor")
@pytest.mark.parametrize(
    ("base", "adapted"),
    [("LlamaForCausalLM", "LlamaForCausalLM"), ("LlamaForCausalLM", "LlamaModel"), ("BertModel", "BertModel")],
)
def test_an_adapter_that_names_no_class_goes_by_what_the_base_says(base, adapted, tmp_path) -> None:
    config = {"LlamaForCausalLM": transformers.LlamaConfig, "BertModel": transformers.BertConfig}[base](**TINY)
    model = save_adapted(Case(base, config, adapted, None, TEXT), tmp_path)
    change_config(tmp_path / "adapter", auto_mapping=None)
    merge_folder(str(tmp_path / "adapter"), str(tmp_path / "merged"))
    merged = getattr(transformers, adapted).from_pretrained(tmp_path / "merged").eval()
    assert merged.config.architectures == [adapted]
    torch.testing.assert_close(outputs(merged, TEXT), outputs(model, TEXT), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_mapping": None}, r"cannot be told which model class of .*: BertModel has no layer 'bert\."),
        (
            {"auto_mapping": {"base_model_class": "Mine", "parent_library": "os"}},
            "cannot be told .*'parent_library': 'os'.*BertModel has no layer",
        ),
        (
            {"task_type": "QUESTION_ANS"},
            "BertForQuestionAnswering has no layer 'bert.pooler.dense'; BertModel has no layer 'bert.encoder[^;]*$",
        ),
        ({"base_model_name_or_path": None}, "does not name its base model; pass --model"),
        ({"base_model_name_or_path": "no/such/model"}, "model 'no/such/model' cannot be loaded"),
    ],
    ids=["no class", "another library's class", "another task", "no base", "no such base"],
)
def test_an_adapter_whose_model_cannot_be_told_is_refused_and_nothing_is_written(changes, message, tmp_path) -> None:
    case = Case(
        "BertModel", transformers.BertConfig(**TINY), "BertForSequenceClassification", None, TEXT, 3, "classifier"
    )
    save_adapted(case, tmp_path)
    mapped = {"auto_mapping": None} if "task_type" in changes else {}
    change_config(tmp_path / "adapter", **(mapped | changes))
    with pytest.raises(LoraInitError, match=message):
        merge_folder(str(tmp_path / "adapter"), str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_an_adapter_for_a_wider_base_is_refused(tmp_path) -> None:
    case = CASES["causal LM"]
    save_adapted(case, tmp_path)
    wider = transformers.LlamaConfig(**(TINY | {"hidden_size": 32}))
    transformers.LlamaForCausalLM(wider).save_pretrained(tmp_path / "wider")
    with pytest.raises(LoraInitError, match="adapter does not fit the base .*wider'"):
        merge_folder(str(tmp_path / "adapter"), str(tmp_path / "merged"), model=str(tmp_path / "wider"))


@pytest.mark.parametrize(
    ("save", "adapted", "loader"),
    [
        (save_tiny_bert, "BertModel", "AutoTokenizer"),
        (save_tiny_vit, "ViTForImageClassification", "AutoImageProcessor"),
        (save_tiny_vit, "ViTForImageClassification", None),
    ],
    ids=["tokenizer", "image processor", "neither"],
)
def test_what_makes_the_inputs_goes_with_the_merged_model(save, adapted, loader, tmp_path, recwarn) -> None:
    base = save(tmp_path / "base")
    model = getattr(transformers, adapted).from_pretrained(base)
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(str(tmp_path / "adapter"))
    if loader is None:
        (base / "preprocessor_config.json").unlink()
    merge_folder(str(tmp_path / "adapter"), str(tmp_path / "merged"))
    told = [str(warning.message) for warning in recwarn if "no tokenizer or processor" in str(warning.message)]
    assert len(told) == (loader is None)
    if loader is not None:
        shutil.rmtree(base)
        found, kind = (getattr(transformers, loader).from_pretrained(tmp_path / "merged"), loader.removeprefix("Auto"))
        assert kind in type(found).__name__ or kind == "Tokenizer"


def test_an_adapter_merged_from_its_folder_gives_the_adapters_outputs(files, tmp_path) -> None:
    train(recipe(files, tmp_path, method="loram"))
    merge_folder(str(tmp_path / "adapter"), str(tmp_path / "merged"))
    task = get_task("sst2")
    base, tokenizer, _ = load_base(files[0], task, "float32")
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    merged, _, _ = load_base(str(tmp_path / "merged"), task, "float32")
    batch = tokenizer(["the good film", "not a plot"], return_tensors="pt", padding=True)
    with torch.no_grad():
        torch.testing.assert_close(merged.eval()(**batch).logits, adapted(**batch).logits, rtol=1e-5, atol=1e-6)


def test_adapters_on_t5_and_vit_merge_into_their_base(other, tmp_path) -> None:
    result = train(small(other, tmp_path / "run"))
    merge_folder(str(tmp_path / "run/adapter"), str(tmp_path / "merged"))
    merged = evaluate(str(tmp_path / "merged"), other["task"], data=other["data"])
    assert merged == pytest.approx(result["metrics"], rel=1e-4)
