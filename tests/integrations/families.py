"""Small random models of many families, and the inputs that each takes."""

import importlib
from dataclasses import dataclass, field

import torch

VOCABULARY, LENGTH = 61, 11
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 5,
    "head_dim": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
}
IMAGE = {"image_size": 12, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@dataclass(frozen=True)
class Family:
    name: str
    model: str
    config: str
    settings: dict = field(default_factory=dict)
    kind: str = "decoder"
    layers: int = 2
    gain: float = 12.0

    def build(self, implementation="eager", seed=0, dtype=torch.float32):
        transformers = importlib.import_module("transformers")
        torch.manual_seed(seed)
        config = getattr(transformers, self.config)(**self.settings)
        config._attn_implementation = implementation
        model = getattr(transformers, self.model)(config).eval().to(dtype)
        with torch.no_grad():  # away from the nearly uniform attention of a fresh model
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(self.gain)
        return model

    def inputs(self, padding=None, length=LENGTH):
        """Token or pixel inputs of a batch of three; ``padding`` is None, "left" or "right"."""
        generator = torch.Generator().manual_seed(1)
        if self.kind == "vision":
            return {"pixel_values": torch.randn(3, 3, 12, 12, generator=generator)}
        tokens = torch.randint(3, VOCABULARY, (3, length), generator=generator)
        mask = torch.ones_like(tokens)
        if padding is not None:
            for b, count in enumerate((0, 2, 4)):
                mask[b, slice(0, count) if padding == "left" else slice(length - count, length)] = 0
        inputs = {"input_ids": tokens, "attention_mask": mask}
        if self.kind == "seq2seq":
            inputs["decoder_input_ids"] = torch.randint(3, VOCABULARY, (3, 7), generator=generator)
        return inputs

    @property
    def is_causal(self):
        return self.kind == "decoder"


T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
}
GPT2 = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1}
DISTIL = {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "pad_token_id": 0}
OPT = {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}
PHI = {**SIZES, "partial_rotary_factor": 0.5}
OSS = {**GROUPED, **MIXED, "num_local_experts": 4, "num_experts_per_tok": 2}
MIXTRAL = {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_MOE = {**GROUPED, **EXPERTS, "num_experts": 4}
GEMMA2 = {**GROUPED, **MIXED, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}
GEMMA3 = {**GROUPED, **MIXED, "query_pre_attn_scalar": 8}
MODERN = {**SIZES, "local_attention": 6, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2}
MISTRAL = {**GROUPED, "sliding_window": 4}
STARCODER = {**SIZES, "num_key_value_heads": 2}

FAMILIES = [
    Family("llama", "LlamaForCausalLM", "LlamaConfig", GROUPED),
    Family("qwen2", "Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    Family("qwen3", "Qwen3ForCausalLM", "Qwen3Config", GROUPED),
    Family("qwen3-moe", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", QWEN_MOE),
    Family("mistral", "MistralForCausalLM", "MistralConfig", MISTRAL),
    Family("mixtral", "MixtralForCausalLM", "MixtralConfig", MIXTRAL),
    Family("gemma2", "Gemma2ForCausalLM", "Gemma2Config", GEMMA2),
    Family("gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA3),
    Family("gpt-oss", "GptOssForCausalLM", "GptOssConfig", OSS),
    Family("gpt2", "GPT2LMHeadModel", "GPT2Config", GPT2),
    Family("gpt-neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", SIZES),
    Family("opt", "OPTForCausalLM", "OPTConfig", OPT),
    Family("phi", "PhiForCausalLM", "PhiConfig", PHI),
    Family("starcoder2", "Starcoder2ForCausalLM", "Starcoder2Config", STARCODER),
    Family("deepseek-v3", "DeepseekV3ForCausalLM", "DeepseekV3Config", {**SIZES, **LATENT}),
    Family("bert", "BertModel", "BertConfig", SIZES, "encoder"),
    Family("roberta", "RobertaModel", "RobertaConfig", SIZES, "encoder"),
    Family("distilbert", "DistilBertModel", "DistilBertConfig", DISTIL, "encoder"),
    Family("modernbert", "ModernBertModel", "ModernBertConfig", MODERN, "encoder"),
    Family("albert", "AlbertModel", "AlbertConfig", {**SIZES, "embedding_size": 16}, "encoder"),
    Family("vit", "ViTModel", "ViTConfig", {**IMAGE, "intermediate_size": 48}, "vision"),
    Family("dinov2", "Dinov2Model", "Dinov2Config", {**IMAGE, "mlp_ratio": 2}, "vision"),
    Family("t5", "T5ForConditionalGeneration", "T5Config", T5, "seq2seq", layers=6, gain=2.0),
    Family("bart", "BartModel", "BartConfig", BART, "seq2seq", layers=6),
]
BY_NAME = {family.name: family for family in FAMILIES}
