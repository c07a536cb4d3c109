# SPDX-License-Identifier: Apache-2.0
"""What the checkpoint may look like, and what is said when it cannot be used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from modelslim.api import DatasetError, ModelError
from modelslim.checkpoint import Checkpoint
from modelslim.guard import Guard
from modelslim.session import Session
from modelslim.testing.adapter import OpenModel
from modelslim_transformers.adapter import TransformersAdapter

pytestmark = pytest.mark.usefixtures("no_grad")

EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 2, "num_experts": 4}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
Stored = Callable[..., Path]
State = Callable[[Any], dict[str, torch.Tensor]]


def opened(path: Path, model_type: str = "llama") -> OpenModel:
    """The model with every parameter loaded."""
    with Checkpoint(path) as checkpoint:
        found = OpenModel.of(TransformersAdapter(model_type, path), checkpoint)
        found.fill()
    return found


def loaded(path: Path, model_type: str = "llama") -> Any:
    """The module alone."""
    return opened(path, model_type).model


def reference(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path)


def assert_same_state(path: Path, model_type: str = "llama", state: State = lambda model: model.state_dict()) -> None:
    """The state of the model is that which transformers loads."""
    model = loaded(path, model_type)
    expected = state(reference(path))
    actual = {
        name: tensor for name, tensor in [*model.named_buffers(), *model.state_dict().items()] if name in expected
    }
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (name, actual[name].dtype) == (name, tensor.dtype)
        assert torch.equal(actual[name], tensor), name


def edit(path: Path, **changes: Any) -> None:
    """Change config.json; None removes a key."""
    file = path / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}), encoding="utf-8")


def refusal(path: Path, model_type: str = "llama", device: str = "cpu") -> ModelError:
    with pytest.raises(ModelError) as caught:
        TransformersAdapter(model_type, path).init_model(device)
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("model_type", "settings"),
    [("llama", {}), ("qwen3_moe", EXPERTS), ("deepseek_v3", LATENT), ("gpt_oss", {"num_local_experts": 4})],
)
def test_parameters_have_the_dtypes_of_from_pretrained(
    model_type: str,
    settings: Mapping[str, Any],
    dtype: torch.dtype,
    stored: Stored,
    common: Mapping[str, Any],
    fused_state: State,
) -> None:
    assert_same_state(stored(model_type, dtype=dtype, **{**common, **settings}), model_type, fused_state)


def test_router_bias_is_read_in_float32_beside_weights_in_bfloat16(stored: Stored, common: Mapping[str, Any]) -> None:
    path = stored("deepseek_v3", **{**common, **LATENT})
    state = loaded(path, "deepseek_v3").state_dict()
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert (state[name].dtype, state["lm_head.weight"].dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(state[name], load_file(path / "model.safetensors")[name].float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_model_without_a_stated_dtype_takes_that_of_its_weights(
    dtype: torch.dtype, stored: Stored, common: Mapping[str, Any], tmp_path: Path
) -> None:
    shutil.copytree(stored("llama", dtype=dtype, **common), tmp_path, dirs_exist_ok=True)
    edit(tmp_path, dtype=None)
    assert loaded(tmp_path).lm_head.weight.dtype == dtype
    assert_same_state(tmp_path)


def test_weights_in_several_files_are_found(stored: Stored, common: Mapping[str, Any], fused_state: State) -> None:
    path = stored("qwen3_moe", shard_size="20KB", **{**common, **EXPERTS})
    assert len(list(path.glob("*.safetensors"))) > 3
    assert_same_state(path, "qwen3_moe", fused_state)


def test_tied_embedding_is_stored_once_and_read_once(stored: Stored, common: Mapping[str, Any]) -> None:
    path = stored("llama", **common, tie_word_embeddings=True)
    found = opened(path)
    model: Any = found.model
    assert "lm_head.weight" not in found.checkpoint.tensors
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(found.loader.names()) == len(found.checkpoint.tensors)
    assert_same_state(path)


def test_head_that_is_stored_in_place_of_the_embedding_fills_both(
    stored: Stored, common: Mapping[str, Any], tmp_path: Path
) -> None:
    shutil.copytree(stored("llama", **common, tie_word_embeddings=True), tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same_state(tmp_path)


def test_checkpoint_of_the_model_without_its_head_is_read(
    stored: Stored, common: Mapping[str, Any], tmp_path: Path
) -> None:
    path = stored("llama", **common, tie_word_embeddings=True)
    shutil.copytree(path, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, tmp_path / "model.safetensors", metadata={"format": "pt"})
    actual, expected = loaded(tmp_path).state_dict(), loaded(path).state_dict()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_tensors_that_the_model_does_not_know_are_named_by_no_source(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    extra = {
        name: torch.ones(2)
        for name in ("model.layers.2.eh_proj.weight", "mtp.norm.weight", "model.rotary_emb.inv_freq")
    }
    save_file({**tensors, **extra}, llama / "model.safetensors", metadata={"format": "pt"})
    sources = opened(llama).loader.sources
    assert {key for source in sources.values() for key in source.keys} == tensors.keys()


def test_language_model_is_taken_out_of_a_vision_language_checkpoint(common: Mapping[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, Qwen3_5Config

    text = {
        **common,
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "depth": 1, "out_hidden_size": 32}
    config = Qwen3_5Config(text_config=text, vision_config=vision)
    AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    edit(tmp_path, architectures=["Qwen3_5ForCausalLM"])

    model = opened(tmp_path, "qwen3_5")
    unnamed = model.checkpoint.tensors.keys() - {key for s in model.loader.sources.values() for key in s.keys}
    assert {name.split(".")[1] for name in unnamed} == {"visual"}
    assert_same_state(tmp_path, "qwen3_5")


def test_rotary_frequencies_of_a_scaled_context_are_computed(stored: Stored, common: Mapping[str, Any]) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 16} | {
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    path = stored("llama", **common, rope_parameters=rope)
    actual, expected = dict(loaded(path).named_buffers()), dict(reference(path).named_buffers())
    assert actual.keys() == expected.keys() == {"model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq"}
    assert all(torch.equal(actual[name], buffer) for name, buffer in expected.items())
    plain = loaded(stored("llama", **common)).get_buffer("model.rotary_emb.inv_freq")
    assert not torch.equal(actual["model.rotary_emb.inv_freq"], plain)


@pytest.mark.parametrize("value", [None, True, False])
def test_cache_is_off_whatever_config_json_says_of_it(value: bool | None, llama: Path) -> None:
    edit(llama, use_cache=value)
    model = loaded(llama)
    assert model.config.use_cache is False
    inputs = {"input_ids": torch.tensor([[3, 4, 5]])}
    request = next(TransformersAdapter("llama", llama).generate_model_forward(model, inputs))
    assert request.kwargs["past_key_values"] is None


def test_model_type_that_transformers_does_not_know_is_refused(llama: Path) -> None:
    edit(llama, model_type="llama_of_the_future")
    error = refusal(llama, "llama_of_the_future")
    assert f"{llama / 'config.json'}: transformers cannot use it" in error.message
    assert "llama_of_the_future" in error.message
    assert "transformers version" in error.hint


def test_model_that_is_no_language_model_is_refused(llama: Path) -> None:
    (llama / "config.json").write_text(json.dumps({"model_type": "vit", "architectures": ["ViTModel"]}))
    assert "cannot build 'vit' as a causal language model" in refusal(llama, "vit").message


@pytest.mark.parametrize("changes", [{"hidden_size": "wide"}, {"hidden_act": "unheard"}])
def test_config_that_makes_no_model_is_refused(changes: Mapping[str, Any], llama: Path) -> None:
    edit(llama, **changes)
    assert str(llama / "config.json") in refusal(llama, device="meta").message


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_quantized_model_is_refused(device: str, llama: Path) -> None:
    edit(llama, quantization_config={"quant_method": "awq", "bits": 4})
    error = refusal(llama, device=device)
    assert "quantized already (quantization_config, method awq)" in error.message
    assert "float checkpoint" in error.hint


def test_quantized_language_part_is_refused(common: Mapping[str, Any], tmp_path: Path) -> None:
    text = {**common, "quantization_config": {"quant_method": "awq", "bits": 4}}
    config = {"model_type": "gemma3", "text_config": text, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "method awq" in refusal(tmp_path, "gemma3").message


def test_empty_quantization_config_means_float(llama: Path) -> None:
    file = llama / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": None}))
    opened(llama)


def test_model_without_a_list_of_layers_is_refused() -> None:
    with pytest.raises(ModelError, match="has no list of layers"):
        next(TransformersAdapter("llama", Path()).generate_model_visit(nn.Sequential(nn.Linear(2, 2))))


REMOTE_CONFIG = """
from transformers import PreTrainedConfig

class OwnConfig(PreTrainedConfig):
    model_type = "own_family"
    hidden_size: int = 16
    num_hidden_layers: int = 2
    vocab_size: int = 64
"""
REMOTE_MODEL = """
import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_own import OwnConfig

class Layer(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.linear = nn.Linear(size, size)
        self.register_buffer("factor", torch.full((size,), 3.0), persistent=False)

    def forward(self, x):
        return x + self.linear(x) * self.factor

class OwnForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config.hidden_size) for _ in range(config.num_hidden_layers))
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    INITIALIZE

    def forward(self, input_ids, use_cache=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return CausalLMOutput(logits=self.head(x))
"""
INITIALIZE = """
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, Layer):
            module.factor.fill_(3.0)
"""


@pytest.fixture(scope="module")
def module_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where transformers copies the code of checkpoints; Python imports it from one place only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture
def own_code(tmp_path: Path, module_cache: None) -> Path:
    """A checkpoint that brings its own code, which fills its buffers as transformers 5 wants it."""
    (tmp_path / "configuration_own.py").write_text(REMOTE_CONFIG)
    (tmp_path / "modeling_own.py").write_text(REMOTE_MODEL.replace("    INITIALIZE\n", INITIALIZE))
    classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config = {"model_type": "own_family", "architectures": ["OwnForCausalLM"], "auto_map": classes, "dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (64, 16), "head.weight": (64, 16)}
    for layer in range(2):
        shapes |= {f"layers.{layer}.linear.weight": (16, 16), f"layers.{layer}.linear.bias": (16,)}
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    return tmp_path


def test_forward_of_the_checkpoints_own_code_is_proven(own_code: Path) -> None:
    from transformers.dynamic_module_utils import HF_MODULES_CACHE

    def open_on(path: Path) -> Session:
        return Session(TransformersAdapter("own_family", path, trust_remote_code=True))

    session = open_on(own_code)
    model = session.init_model("meta")
    copies = sorted(Path(HF_MODULES_CACHE).rglob("modeling_own.py"))
    assert Guard("own", lambda model_type, path: open_on(path)).check(session, model) == []
    assert sorted(Path(HF_MODULES_CACHE).rglob("modeling_own.py")) == copies != []


def test_code_of_the_checkpoint_is_not_run_unasked(own_code: Path) -> None:
    for file in own_code.glob("*.py"):
        file.write_text("raise RuntimeError('this was run')")
    error = refusal(own_code, "own_family")
    assert "--trust_remote_code True" in error.hint
    assert "this was run" not in error.message


def test_code_of_the_checkpoint_is_run_when_trusted(own_code: Path) -> None:
    with Checkpoint(own_code) as checkpoint:
        model = OpenModel.of(TransformersAdapter("own_family", own_code, trust_remote_code=True), checkpoint)
        inputs = [{"input_ids": torch.tensor([[3, 4, 5]])}, {"input_ids": torch.tensor([[6, 7]])}]
        outputs = model.run_units(inputs)
    tensors = load_file(own_code / "model.safetensors")
    for sample, output in zip(inputs, outputs, strict=True):
        x = tensors["embed.weight"][sample["input_ids"]]
        for layer in ("layers.0.linear", "layers.1.linear"):
            x = x + nn.functional.linear(x, tensors[f"{layer}.weight"], tensors[f"{layer}.bias"]) * 3
        assert torch.equal(output, nn.functional.linear(x, tensors["head.weight"]))


def test_code_that_leaves_a_buffer_empty_is_refused(own_code: Path) -> None:
    (own_code / "modeling_own.py").write_text(REMOTE_MODEL.replace("    INITIALIZE\n", ""))
    with pytest.raises(ModelError, match=r"does not compute its buffer layers\.0\.factor") as caught:
        TransformersAdapter("own_family", own_code, trust_remote_code=True).init_model("cpu")
    assert "_init_weights" in str(caught.value)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "gpt2"])
@pytest.mark.parametrize("left", [(), ("tokenizer_config.json",)])
def test_missing_tokenizer_is_refused(
    model_type: str, left: tuple[str, ...], stored: Stored, common: Mapping[str, Any], tmp_path: Path
) -> None:
    source = stored(model_type, **({} if model_type == "gpt2" else common))
    for name in ("config.json", *left):
        shutil.copy(source / name, tmp_path)
    with pytest.raises(ModelError) as caught:
        TransformersAdapter(model_type, tmp_path).handle_dataset(["some text"], "cpu")
    assert f"{tmp_path}: " in caught.value.message
    assert "tokenizer.json" in caught.value.hint


def test_sample_becomes_its_tokens_without_padding_or_truncation(llama: Path) -> None:
    adapter = TransformersAdapter("llama", llama)
    inputs = adapter.handle_dataset(["abc", "cab " * 200], "cpu")
    assert inputs[0]["input_ids"].tolist() == [[3, 4, 5]]
    assert inputs[1]["input_ids"].tolist() == [[5, 3, 4, 39] * 200]
    assert all(sample["input_ids"].dtype == torch.long for sample in inputs)


def test_chat_is_written_with_the_template_of_the_tokenizer(llama: Path) -> None:
    template = "{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }}{% endfor %}"
    (llama / "chat_template.jinja").write_text(template)
    chat = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
    adapter = TransformersAdapter("llama", llama)
    (sample,) = adapter.handle_dataset([chat], "cpu")
    assert sample["input_ids"].tolist() == adapter.handle_dataset(["u aba c"], "cpu")[0]["input_ids"].tolist()


def test_chat_without_a_template_is_refused(llama: Path) -> None:
    with pytest.raises(DatasetError, match="no chat template") as caught:
        TransformersAdapter("llama", llama).handle_dataset([[{"role": "user", "content": "ab"}]], "cpu")
    assert caught.value.hint


def test_sample_without_tokens_is_named_by_its_number(llama: Path) -> None:
    with pytest.raises(DatasetError, match="calibration sample 2 has no tokens"):
        TransformersAdapter("llama", llama).handle_dataset(["abc", "", "abc"], "cpu")


def test_chat_that_the_template_refuses_is_an_error_of_the_data(llama: Path) -> None:
    (llama / "chat_template.jinja").write_text("{{ raise_exception('no system message, please') }}")
    with pytest.raises(DatasetError, match=r"sample 1: .*no system message, please"):
        TransformersAdapter("llama", llama).handle_dataset([[{"role": "system", "content": "ab"}]], "cpu")


def test_tokens_that_the_model_does_not_know_are_refused(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "vocab_size": 2}))
    with pytest.raises(ModelError, match="the model knows 2 tokens"):
        TransformersAdapter("llama", llama).handle_dataset(["abc"], "cpu")
