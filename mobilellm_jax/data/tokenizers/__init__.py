"""Text to token ids and back: SentencePiece and Hugging Face tokenizers."""
