"""The layouts of published models that tests hold equal to sentence-transformers, by engine."""

from tests.harness import edits
from tests.harness.layouts import (
    ABSOLUTE,
    DECODER,
    DISTILBERT,
    ENCODER,
    HEADS,
    HIDDEN,
    IDENTITY,
    LAYERS,
    POSITIONS,
    ROBERTA,
    SPECIAL,
    T5,
    TANH,
    VOCABULARY,
    Layout,
)

QUERIES = {"query": "query: ", "document": "passage: "}

# The first twelve are held against vLLM's scheduler, too.
SCHEDULED = {
    "bert-bare": Layout("BertModel", "BertConfig", ENCODER, bare=True),
    "bert-default-prompt": Layout(
        "BertModel", "BertConfig", ENCODER, prompts={"passage": "passage: "}, default_prompt="passage"
    ),
    "bert-cls": Layout("BertModel", "BertConfig", ENCODER, "cls_token"),
    "bert-mean-dense": Layout("BertModel", "BertConfig", ENCODER, dense=((48, TANH),)),
    "roberta": Layout("RobertaModel", "RobertaConfig", ROBERTA, extra=ABSOLUTE),
    "xlm-roberta": Layout("XLMRobertaModel", "XLMRobertaConfig", ROBERTA, "cls_token"),
    "modernbert": Layout(
        "ModernBertModel",
        "ModernBertConfig",
        {
            **ENCODER,
            **SPECIAL,
            "num_hidden_layers": 4,
            "local_attention": 32,
            "global_attn_every_n_layers": 2,
        },
        "cls_token",
    ),
    "embeddinggemma": Layout(
        "Gemma3TextModel",
        "Gemma3TextConfig",
        {
            **DECODER,
            "num_hidden_layers": 4,
            "use_bidirectional_attention": True,
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        dense=((96, IDENTITY), (HIDDEN, IDENTITY)),
    ),
    "qwen3": Layout("Qwen3ForCausalLM", "Qwen3Config", DECODER, "lasttoken"),
    "qwen2": Layout("Qwen2ForCausalLM", "Qwen2Config", DECODER, "lasttoken", bytes="Qwen2Tokenizer"),
    "mistral": Layout("MistralModel", "MistralConfig", {**DECODER, "sliding_window": 64}, "lasttoken"),
    "llama": Layout("LlamaModel", "LlamaConfig", DECODER, normalize=False),
}
VLLM = {
    **SCHEDULED,
    "labse": Layout("BertModel", "BertConfig", ENCODER, "cls_token", dense=((HIDDEN, TANH),)),
    "bert-unnormalised": Layout("BertModel", "BertConfig", ENCODER, normalize=False),
    "e5": Layout("XLMRobertaModel", "XLMRobertaConfig", ROBERTA, extra=ABSOLUTE, prompts=QUERIES),
    "qwen3-model": Layout("Qwen3Model", "Qwen3Config", DECODER, "lasttoken", prompts=QUERIES),
    "qwen3-mean": Layout("Qwen3Model", "Qwen3Config", DECODER),
    "mistral-causal": Layout("MistralForCausalLM", "MistralConfig", DECODER, "lasttoken"),
    "gemma3-causal": Layout("Gemma3ForCausalLM", "Gemma3TextConfig", DECODER, "lasttoken"),
    "bin": Layout("BertModel", "BertConfig", ENCODER, edit=edits.pickled),
    "float16": Layout("BertModel", "BertConfig", ENCODER, edit=edits.halved),
    "shards": Layout("BertModel", "BertConfig", ENCODER, edit=edits.sharded),
    "resaved": Layout("BertModel", "BertConfig", ENCODER, prompts=QUERIES, edit=edits.resaved),
    "resaved-qwen3": Layout("Qwen3Model", "Qwen3Config", DECODER, "lasttoken", edit=edits.resaved),
    "resaved-dense": Layout("BertModel", "BertConfig", ENCODER, dense=((48, TANH),), edit=edits.resaved),
    "short": Layout("BertModel", "BertConfig", ENCODER, edit=edits.of_128_tokens),
    "bert-cased": Layout("BertModel", "BertConfig", ENCODER, edit=edits.cased),
    "truncated-left": Layout("BertModel", "BertConfig", ENCODER, edit=edits.cut_left),
}
# Those that vLLM hasn't, or would give other vectors for.
SECOND_ENGINE = {
    "bert-max": Layout("BertModel", "BertConfig", ENCODER, "max_tokens"),
    "bert-mean-and-max": Layout("BertModel", "BertConfig", ENCODER, more_pooling=("max_tokens",)),
    "bert-mean-sqrt": Layout("BertModel", "BertConfig", ENCODER, "mean_sqrt_len_tokens"),
    "instructor": Layout(
        "T5EncoderModel",
        "T5Config",
        T5,
        dense=((HIDDEN, IDENTITY),),
        prompts={"query": "Represent the question: ", "document": "Represent the document: "},
        pools_prompt=False,
    ),
    "default-prompt-left-out": Layout(
        "BertModel",
        "BertConfig",
        ENCODER,
        prompts={"passage": "passage: "},
        default_prompt="passage",
        pools_prompt=False,
    ),
    "cls-prompt-left-out": Layout(
        "BertModel", "BertConfig", ENCODER, "cls_token", prompts=QUERIES, pools_prompt=False
    ),
    "bert-layer-norm": Layout("BertModel", "BertConfig", ENCODER, edit=edits.layer_norm),
    "bert-dense-after-normalize": Layout("BertModel", "BertConfig", ENCODER, edit=edits.dense_last),
    "bert-in-a-folder": Layout("BertModel", "BertConfig", ENCODER, edit=edits.nested),
    "bert-heads-of-16": Layout("BertModel", "BertConfig", {**ENCODER, "num_attention_heads": 4}),
    "qwen3-weighted-mean": Layout("Qwen3ForCausalLM", "Qwen3Config", DECODER, "weightedmean_tokens"),
    "gpt2-weighted-mean": Layout(
        "GPT2Model",
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": HIDDEN,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_positions": POSITIONS,
        },
        "weightedmean_tokens",
        bytes="GPT2Tokenizer",
    ),
    "electra": Layout("ElectraModel", "ElectraConfig", {**ENCODER, "embedding_size": 32}),
    "mpnet": Layout("MPNetModel", "MPNetConfig", ROBERTA),
    "distilbert": Layout("DistilBertModel", "DistilBertConfig", DISTILBERT),
    "distiluse": Layout(
        "DistilBertModel", "DistilBertConfig", DISTILBERT, dense=((48, TANH),), normalize=False
    ),
    "albert": Layout("AlbertModel", "AlbertConfig", {**ENCODER, "embedding_size": 32}),
    "deberta": Layout("DebertaModel", "DebertaConfig", ENCODER),
    "deberta-v2": Layout("DebertaV2Model", "DebertaV2Config", ENCODER, "cls_token"),
    "camembert": Layout("CamembertModel", "CamembertConfig", ROBERTA),
    "data2vec": Layout("Data2VecTextModel", "Data2VecTextConfig", ROBERTA),
    "nomic": Layout("NomicBertModel", "NomicBertConfig", ENCODER, prompts=QUERIES),
    "t5-encoder": Layout("T5EncoderModel", "T5Config", T5, dense=((HIDDEN, IDENTITY),)),
    "mt5-encoder": Layout("MT5EncoderModel", "MT5Config", T5),
    "ernie": Layout("ErnieModel", "ErnieConfig", ENCODER),
    "roformer": Layout("RoFormerModel", "RoFormerConfig", {**ENCODER, "embedding_size": HIDDEN}),
    "mobilebert": Layout(
        "MobileBertModel", "MobileBertConfig", {**ENCODER, "embedding_size": 32, "intra_bottleneck_size": 32}
    ),
    "megatron-bert": Layout("MegatronBertModel", "MegatronBertConfig", ENCODER),
    "gemma": Layout("GemmaModel", "GemmaConfig", DECODER, "lasttoken"),
    "opt": Layout(
        "OPTModel",
        "OPTConfig",
        {**ENCODER, "ffn_dim": 2 * HIDDEN, "word_embed_proj_dim": HIDDEN},
        "lasttoken",
        bytes="GPT2Tokenizer",
    ),
}
GALLERY = VLLM | SECOND_ENGINE
