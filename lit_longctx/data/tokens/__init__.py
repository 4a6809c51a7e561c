"""Text and chats to token ids: tokenizers, special tokens, chat templates."""
