"""The architectures of docs/support.md as tiny models with random weights: no network, float32, fixed seeds.

Every model has layers of each kind that the architecture has, windows (12 tokens) that are shorter than the prompts (20
and more), and a vocabulary of 97 tokens.  Weights are ten times larger than usual, so that attention is sharp enough
for a wrong key to change the next token.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from models import INIT_RANGE, PAD, VOCAB
from packaging.version import Version
from stand_ins import FLASH
from transformers import PreTrainedModel

WINDOW = 12
PROMPT = 21
RAGGED = (21, 13, 2)
ENCODER = 19  # tokens that an encoder reads
IMAGE_TOKEN = VOCAB - 1

_TOKENS = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": None}
_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": INIT_RANGE,
    "tie_word_embeddings": False,
} | _TOKENS
_NO_HEAD_DIM = {name: value for name, value in _BASE.items() if name != "head_dim"}
# All experts take part: a router that leaves some out would turn a rounding error into another expert.
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 32}
_SLIDING = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
}


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Args:
        name: as the table shows it.
        model: name of the class in transformers.
        config: name of its config class.
        options: arguments of the config, or a function that makes them.
        kind: ``"decoder"``, ``"encoder-decoder"``, ``"speech"`` (an encoder of features) or ``"vision"`` (a decoder
            with an image in its prompt).
        note: why its attention does not read the pages by default.
        since: what transformers itself does only since a version, by column ("" for all): the version, and why.
        begins_again: whether it reads all tokens again in the middle of generating, which is another graph.
    """

    name: str
    model: str
    config: str
    options: Mapping[str, Any] | Callable[[], Mapping[str, Any]] = field(repr=False)
    kind: str = "decoder"
    note: str = ""
    since: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    begins_again: bool = False

    def missing(self, column: str) -> str:
        """Why the installed transformers itself does not do ``column``; empty if it does."""
        for key in ("", column):
            version, reason = self.since.get(key, ("0", ""))
            if Version(transformers.__version__) < Version(version):
                return reason
        flag = "_supports_sdpa" if column == "sdpa" else "_supports_flex_attn" if "flex" in column else ""
        flag = "_supports_flash_attn" if column in FLASH else flag
        if flag and not getattr(getattr(transformers, self.model), flag, False):
            return f"transformers refuses to load {self.model} so"
        return ""

    @property
    def exists(self) -> bool:
        """Whether the installed transformers has it."""
        return hasattr(transformers, self.model) and hasattr(transformers, self.config)

    def build(self, seed: int = 0) -> PreTrainedModel:
        """The model with random weights from ``seed``, in evaluation mode; it never emits an end of sequence."""
        options = self.options() if callable(self.options) else self.options
        torch.manual_seed(seed)
        model = getattr(transformers, self.model)(getattr(transformers, self.config)(**options)).eval()
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "norm" not in name.lower() and "ln_" not in name:
                torch.nn.init.normal_(parameter, std=0.2)  # biases, sinks and gates: zero after initialisation
        if self.kind in ("encoder-decoder", "speech"):
            # Tied to embeddings of this size, it would repeat its last token for ever.
            size = model.get_output_embeddings().weight.shape
            model.set_output_embeddings(torch.nn.Linear(size[1], size[0], bias=False))
            torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.3)
        settings = model.generation_config
        settings.eos_token_id, settings.pad_token_id, settings.bos_token_id = None, PAD, 1
        settings.forced_eos_token_id = settings.forced_bos_token_id = settings.suppress_tokens = None
        if self.kind == "vision":
            settings.suppress_tokens = [IMAGE_TOKEN]  # in the next turn's prompt it would ask for an image
        return model

    @property
    def prompt_name(self) -> str:
        """The argument that carries the decoder's prompt."""
        return "decoder_input_ids" if self.kind in ("encoder-decoder", "speech") else "input_ids"

    @property
    def mask_name(self) -> str:
        """The argument that carries the mask of the decoder's prompt."""
        return self.prompt_name.replace("input_ids", "attention_mask")

    def inputs(self, batch: int = 1, ragged: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
        """Arguments of ``generate``: a prompt of 21 random tokens for the decoder, and what an encoder reads.

        Args:
            batch: number of sequences; 3 when ragged.
            ragged: prompts of 21, 13 and 2 tokens, padded on the left (encoders read 19, 11 and 2).
            seed: another seed, other tokens.
        """
        generator = torch.Generator().manual_seed(seed)
        batch = len(RAGGED) if ragged else batch
        lengths = (*RAGGED[:2], 7) if self.kind == "vision" else RAGGED  # the image needs six tokens
        ids = torch.randint(3, IMAGE_TOKEN, (batch, PROMPT), generator=generator)
        inputs = {self.prompt_name: ids, self.mask_name: _pad(ids, lengths if ragged else ())}
        if self.prompt_name == "decoder_input_ids":
            ids[0, 0] = 1  # where no prompt begins with this token, generate puts it there
        if self.kind == "encoder-decoder":
            inputs["input_ids"] = read = torch.randint(3, IMAGE_TOKEN, (batch, ENCODER), generator=generator)
            inputs["attention_mask"] = _pad(read, (ENCODER, 11, 2) if ragged else ())
        elif self.kind == "speech":
            inputs["input_features"] = torch.randn(batch, 8, 2 * ENCODER, generator=generator)
        elif self.kind == "vision":
            inputs["pixel_values"] = torch.randn(batch, 3, 8, 8, generator=generator)
            ids[:, -6:-2] = IMAGE_TOKEN
        return inputs


def _pad(ids: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """The mask of ``ids``; row i is padded on the left, in place, until it has ``lengths[i]`` tokens of its own."""
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : ids.shape[1] - length] = 0
        ids[row, : ids.shape[1] - length] = PAD
    return mask


def _decoder(name: str, **changes: Any) -> Architecture:
    """A decoder called ``<name>ForCausalLM`` whose config follows Llama's names."""
    base = _BASE if changes.pop("takes_head_dim", True) else _NO_HEAD_DIM
    config = changes.pop("config", f"{name}Config")
    title = changes.pop("title", name)
    more = {name: changes.pop(name) for name in ("since", "begins_again") if name in changes}
    return Architecture(title, f"{name}ForCausalLM", config, base | changes, **more)


def _llava() -> Mapping[str, Any]:
    text = transformers.LlamaConfig(**_BASE)
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=32,
    )
    return {"text_config": text, "vision_config": vision, "image_token_index": IMAGE_TOKEN} | _TOKENS


_OWN = "its attention is arithmetic of its own: it calls no attention function, neither transformers' nor torch's"
_SMALL = {"vocab_size": VOCAB, "initializer_range": INIT_RANGE, "tie_word_embeddings": False} | _TOKENS
# The embedding changes at 24 tokens, which every way of generating crosses: nothing cached before holds beyond it.
_LONG_ROPE = {
    "original_max_position_embeddings": PROMPT + 3,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "factor": 4.0,
        "original_max_position_embeddings": PROMPT + 3,
    },
}
_GEMMA = {"query_pre_attn_scalar": 16}
_LATENT = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
_HYBRID = {
    "num_hidden_layers": 4,
    "decoder_sparse_step": 1,
    "shared_expert_intermediate_size": 32,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_SHARED = _SLIDING | {
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 16,
    "global_head_dim": 32,
}
_SEQ2SEQ = {"decoder_start_token_id": 1, "vocab_size": VOCAB, "tie_word_embeddings": False} | _TOKENS
_BART = _SEQ2SEQ | {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "init_std": INIT_RANGE,
}

ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        _decoder("Llama"),
        _decoder("Qwen2", takes_head_dim=False),
        _decoder("Qwen3"),
        _decoder("Qwen3Moe", title="Qwen3-MoE", **_EXPERTS),
        _decoder("Mistral", sliding_window=None),
        _decoder("Mistral", title="Mistral, every layer with a window", sliding_window=WINDOW),
        _decoder("Mixtral", num_local_experts=4, num_experts_per_tok=4, sliding_window=None),
        _decoder("Phi3", takes_head_dim=False),
        _decoder(
            "Phi3",
            title="Phi3, beyond its original length",
            since={
                "": ("5.20", "where the embedding changes, transformers before 5.20 goes on with the last token alone"),
                "compile": ("5.24", "transformers before 5.24 does not compile this rotary embedding with StaticCache"),
            },
            begins_again=True,
            takes_head_dim=False,
            **_LONG_ROPE,
        ),
        _decoder("Gemma2", attn_logit_softcapping=5.0, **_SLIDING, **_GEMMA),
        _decoder("Gemma3", title="Gemma3, text", config="Gemma3TextConfig", **_SLIDING, **_GEMMA),
        _decoder("Gemma4", title="Gemma4, text", config="Gemma4TextConfig", **_SHARED),
        _decoder(
            "GptOss",
            title="gpt-oss",
            num_local_experts=4,
            num_experts_per_tok=4,
            **_SLIDING,
        ),
        _decoder("Cohere2", takes_head_dim=False, logit_scale=1.0, **_SLIDING),
        _decoder("Olmo2", title="OLMo2", takes_head_dim=False),
        _decoder("Granite", takes_head_dim=False, attention_multiplier=0.25, residual_multiplier=0.7),
        Architecture(
            "GPT-2",
            "GPT2LMHeadModel",
            "GPT2Config",
            _SMALL | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
        ),
        _decoder("GPTNeoX", title="GPT-NeoX", takes_head_dim=False),
        _decoder("OPT", takes_head_dim=False, ffn_dim=64, word_embed_proj_dim=64, init_std=INIT_RANGE),
        _decoder("Falcon", takes_head_dim=False),
        Architecture(
            "BLOOM",
            "BloomForCausalLM",
            "BloomConfig",
            _SMALL | {"hidden_size": 64, "n_layer": 2, "n_head": 4},
            note=_OWN,
        ),
        _decoder("DeepseekV3", title="DeepSeek-V3", takes_head_dim=False, **_LATENT),
        _decoder("Qwen3Next", title="Qwen3-Next", **_EXPERTS, **_HYBRID),
        Architecture(
            "T5",
            "T5ForConditionalGeneration",
            "T5Config",
            _SEQ2SEQ | {"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4},
            "encoder-decoder",
        ),
        Architecture("BART", "BartForConditionalGeneration", "BartConfig", _BART, "encoder-decoder"),
        Architecture(
            "Whisper",
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            _BART | {"num_mel_bins": 8, "max_source_positions": ENCODER, "max_target_positions": 128},
            "speech",
        ),
        Architecture("LLaVA", "LlavaForConditionalGeneration", "LlavaConfig", _llava, "vision"),
    )
}
