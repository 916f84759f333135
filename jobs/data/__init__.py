"""The data side of a recipe: its stages, and what people ask about data sets."""
