"""What a probe reads."""

from typing import Annotated

from pydantic import Field, model_validator

from pipelines.config import STDLIB, Part, Positive

WINDOW = 512  # tokens that are near, where the model's context allows


class Probe(Part):
    """`prompts` of each kind, of `tokens` tokens (by default four times `local`), are read in full attention. What lies
    less than `local` tokens back is not asked for (by default 512, or a quarter of the model's context where that is
    less). `text`: what natural prompts are cut from, a source's path. `causal`: with how many prompts of each kind it
    is also measured what each layer's far attention is worth."""

    prompts: Positive = 8
    local: Positive | None = None
    tokens: Positive | None = None
    text: str = STDLIB
    causal: Annotated[int, Field(ge=0)] = 0
    seed: int = 0

    @model_validator(mode="after")
    def _there_are_prompts(self) -> "Probe":
        if self.causal > self.prompts:
            raise ValueError(f"causal ({self.causal}) is more than prompts ({self.prompts}): they are some of them")
        return self

    def window(self, context: int) -> int:
        """Tokens that are near, for a model of this context."""
        return self.local if self.local is not None else max(1, min(WINDOW, context // 4))

    def length(self, context: int) -> int:
        """Tokens of a prompt, for a model of this context."""
        return self.tokens if self.tokens is not None else min(context, 4 * self.window(context))
