"""The model families, by the `model_type` of config.json. One more is one more file here."""

from megatron_ext.hf.families.deepseek import DEEPSEEK_V3
from megatron_ext.hf.families.deepseek_3_2 import DEEPSEEK_V32
from megatron_ext.hf.families.family import Family
from megatron_ext.hf.families.glm import GLM4_MOE
from megatron_ext.hf.families.glm_lite import GLM4_MOE_LITE
from megatron_ext.hf.families.gpt_oss import GPT_OSS
from megatron_ext.hf.families.llama import LLAMA
from megatron_ext.hf.families.minimax import MINIMAX_M2
from megatron_ext.hf.families.mixtral import MIXTRAL
from megatron_ext.hf.families.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE
from megatron_ext.hf.families.qwen_3_5 import QWEN3_5_MOE_TEXT
from megatron_ext.hf.families.qwen_next import QWEN3_NEXT

FAMILIES: dict[str, Family] = {
    "qwen3_moe": QWEN3_MOE,
    "qwen3": QWEN3,
    "qwen2": QWEN2,
    "llama": LLAMA,
    "qwen2_moe": QWEN2_MOE,
    "mixtral": MIXTRAL,
    "deepseek_v3": DEEPSEEK_V3,  # Moonlight too
    "kimi_k2": DEEPSEEK_V3,
    "deepseek_v32": DEEPSEEK_V32,
    "glm4_moe": GLM4_MOE,
    "glm4_moe_lite": GLM4_MOE_LITE,
    "minimax_m2": MINIMAX_M2,
    "gpt_oss": GPT_OSS,
    "qwen3_next": QWEN3_NEXT,
    "qwen3_5_moe_text": QWEN3_5_MOE_TEXT,
}
