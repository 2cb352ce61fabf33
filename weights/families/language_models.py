"""The language models of transformers, as far as all of them are alike: the classes with an output head."""

from weights.families.core.family import Family

FAMILY = Family(
    heads=("ForCausalLM", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining", "LMHeadModel", "WithLMHead")
)
