"""A recipe with variants: several runs over the same corpus, side by side.

    variants:
      standard: {set: {finetune.objective: {kind: standard, context: 256}}}
      fot: {}
      memorizing-after-fot: {after: fot, set: {finetune.steps: 100, ...}}

Each variant is the recipe with other values for some keys, named `<name>-<variant>`; what variants have in common is
made once, because the stages are the same.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from jobs.config.recipe import Recipe
from jobs.config.settings import Content, read_overridden, set_key, validated
from pipelines.config import Part
from pipelines.workflow.errors import UserError


class Variant(Part):
    """`set`: values by "key.path", as on the command line. `after`: the variant, named before this one, whose model is
    the base."""

    after: str | None = None
    set: Mapping[str, Any] = Field(default_factory=dict)


class Variants(Part):
    """The part of the recipe file that holds them."""

    variants: dict[str, Variant]


@dataclass(frozen=True)
class Comparison:
    """The variants of a recipe file, in order. `content`: the keys of the file, `common`: the recipe they make without
    variants."""

    path: Path
    content: Content
    common: Recipe
    variants: Mapping[str, Variant]

    def recipe(self, variant: str, base: Path | None = None) -> Recipe:
        """A variant's recipe; `base`: the model it comes after. Raises UserError for what is wrong in it."""
        content = deepcopy(self.content)
        content["name"] = f"{content['name']}-{variant}"
        if base is not None:
            content["base"] = {"checkpoint": str(base)}
        for key, value in self.variants[variant].set.items():
            set_key(content, key, value)
        return validated(Recipe, content, f"recipe {self.path}, variant {variant}")


def load_comparison(path: Path, overrides: Sequence[str] = ()) -> Comparison | None:
    """The comparison in a recipe file; None where it has no variants. Raises UserError, one line, for whatever is wrong
    in any of them."""
    content = read_overridden(path, overrides)
    if not content.get("variants"):
        return None
    variants = validated(Variants, {"variants": content.pop("variants")}, f"recipe {path}").variants
    common = validated(Recipe, content, f"recipe {path}")
    comparison = Comparison(path, content, common, variants)
    known: list[str] = []
    for name, variant in variants.items():
        if variant.after is not None and variant.after not in known:
            raise UserError(
                f"recipe {path}, variant {name}: after {variant.after}: name a variant that stands before it"
            )
        recipe = comparison.recipe(name, Path("a-model") if variant.after else None)
        if recipe.work_dir != common.work_dir:
            raise UserError(f"recipe {path}, variant {name}: sets work_dir: variants share the recipe's")
        known.append(name)
    return comparison
