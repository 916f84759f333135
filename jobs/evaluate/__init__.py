"""What a trained model can do: perplexity by context length, passkey retrieval."""
