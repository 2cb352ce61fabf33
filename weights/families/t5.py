"""T5, a text encoder. Its layers have the same names everywhere."""

from weights.families.core.family import Family

FAMILY = Family(
    components={
        "t5xxl": ("text_encoder_3", "text_encoder_2", "text_encoder"),
        "text_encoder_3": ("text_encoder_2",),  # The third for kohya's scripts also where there are two.
    },
)
