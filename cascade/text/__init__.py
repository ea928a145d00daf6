"""From prompts to what the stages condition on: tokenizers, frozen encoders, embedding cache."""
